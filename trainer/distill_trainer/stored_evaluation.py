"""How near a student is to its teacher by what a store keeps of it, with no teacher in memory.

Not every store can say everything. Each figure comes with what it is: exact, an unbiased estimate, a lower bound; or,
without a number, why it cannot be said and which flag of `logitstore build` would keep what it takes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import distill_kernels
from distill_kernels import on_tier

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from distill_trainer.batches import Batch, Weighing, collate
from distill_trainer.comparison import BINS, TOP, calibration, common, log_softmax, perplexity, top
from distill_trainer.losses import Loss, loss_of
from logitstore.codec import LEAST
from logitstore.contract import Store
from logitstore.errors import DatasetError, IncompatibleStoreError
from logitstore.forward import logit_rows
from logitstore.manifest import Manifest
from logitstore.measures import ASSUMED
from logitstore.model import LoadedModel
from logitstore.recipe import Recipe
from logitstore.sequences import TokenSequence
from logitstore.targets import SparseTargets

FLOOR = f"{LEAST:.1e}"
"""The least probability that a sampled entry is kept with: where the student gives much to rarer tokens, a reverse KL
from their kept log-probs is too small."""


@dataclass(frozen=True)
class Stated:
    """A figure and what it is, or why there is none."""

    value: float | None
    what: str


@dataclass
class _Mean:
    """A mean over positions, as it grows."""

    total: float = 0.0
    count: int = 0

    def add(self, values: npt.NDArray[np.floating]) -> None:
        self.total += float(values.sum(dtype=np.float64))
        self.count += len(values)

    @property
    def value(self) -> float | None:
        return self.total / self.count if self.count else None


@dataclass
class StoredEvaluation:
    """A student over the trained positions that a store answers."""

    positions: int = 0
    unanswered: int = 0
    """Trained positions that the store does not answer; no figure is of them."""
    figures: dict[str, Stated] = field(default_factory=dict)
    """By the names of `Evaluation`'s fields."""
    bins: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros((BINS, 3)))
    """[BINS, 3]; as `comparison.Sums`."""


def evaluate_stored(
    student: LoadedModel, store: Store, sequences: Sequence[TokenSequence], quiet: bool = False
) -> StoredEvaluation:
    """Hold a student against the targets of a store, at temperature 1.

    KL(p || q), from an unbiased sample, is sum_i w_i (-log q_i) - H(p): the first is unbiased, the entropy is kept to
    the nearest 1/16 nat. From a truncated teacher it is that of its kept tokens and one cell for the rest. Acceptance
    is sum_i w_i min(1, q_i / p_i) where entries know their own p_i.

    Raises:
        DatasetError: the store answers no trained position.
        ConfigError: it has nothing at temperature 1.
        CorruptStoreError: its bytes are not those that were written.
        ModelError: logits that are no numbers.
    """
    recipe = store.manifest.recipe
    recipe.set_number(1.0)
    reverse = _reverse_kl(recipe, str(store.path))
    truncated = None if recipe.selection.unbiased else loss_of(("kl",), recipe, 1.0, str(store.path))
    head = distill_kernels.split_head(student.model)
    student.model.eval()
    means = {name: _Mean() for name in ("kl", "reverse_kl", "agreement", "top5_agreement", "acceptance", "nll")}
    found = StoredEvaluation()
    bar = tqdm(sequences, desc="evaluate", unit="doc", delay=1, leave=False, disable=quiet)
    for sequence in bar:
        targets = store.get(sequence.token_ids, 1.0)
        trained = np.flatnonzero(sequence.trained)
        answered = trained[trained < (0 if targets is None else len(targets))]
        found.unanswered += len(trained) - len(answered)
        batch = collate([sequence], [targets], Weighing(1.0, "skip"))
        if targets is None or batch is None:
            continue
        found.positions += len(answered)
        hidden = head.trunk(batch.tokens)[0] if head.reason is None else head.model(batch.tokens)[0]
        for at in range(0, len(answered), logit_rows(recipe.vocab_size)):
            rows = slice(at, at + logit_rows(recipe.vocab_size))
            part = hidden[batch.rows[rows]]
            logits = (head(part) if head.reason is None else part)[:, : recipe.vocab_size]
            log_q = log_softmax(logits)
            labels = batch.labels[rows]
            of_label = np.array(mx.take_along_axis(log_q, labels[:, None], axis=-1))[:, 0]
            means["nll"].add(-of_label)
            found.bins += calibration(log_q, labels)
            own = targets.rows(answered[rows])
            inside = own.ids < logits.shape[-1]  # a teacher's padding may reach beyond the student's
            own = replace(own, weights=np.where(inside, own.weights, 0))
            ids = mx.array(np.where(inside, own.ids, 0).astype(np.int32))
            at_entries = np.array(mx.take_along_axis(log_q, ids, axis=-1), np.float64)
            if truncated is None:
                weighed = np.where(own.weights > 0, own.weights * -at_entries, 0).sum(axis=1)
                means["kl"].add(weighed - own.entropy)
            else:
                means["kl"].add(_value(truncated, logits, batch, rows))
            if not isinstance(reverse, str):
                means["reverse_kl"].add(_value(reverse, logits, batch, rows))
            _heads(means, own, log_q, at_entries, recipe)
    if not found.positions:
        raise DatasetError(
            f"{store.path} answers none of the {found.unanswered:,} trained positions; type --dataset with what it was "
            "built of, or --teacher T"
        )
    found.figures = _stated(means, store.manifest, reverse, student.name)
    return found


def _heads(
    means: dict[str, _Mean],
    own: SparseTargets,
    log_q: mx.array,
    at_entries: npt.NDArray[np.float64],
    recipe: Recipe,
) -> None:
    """What the head's tokens, or each entry's own probability, say."""
    kind = recipe.selection.kind
    if kind != "random":
        headed = own.head_count > 0
        likeliest = own.ids[np.arange(len(own)), np.where(own.in_head, own.weights, -1).argmax(axis=1)]
        means["agreement"].add((np.array(log_q.argmax(axis=-1)) == likeliest)[headed].astype(np.float64))
    if kind == "top-k" and own.ids.shape[1] >= TOP:
        five = (own.weights > 0).sum(axis=1) >= TOP  # of fewer in an imported cache, and of the rarest, none is told
        theirs = np.take_along_axis(own.ids, np.argsort(-own.weights, axis=1)[:, :TOP], axis=1)
        means["top5_agreement"].add(np.array(common(mx.array(theirs), top(log_q)))[five])
    with np.errstate(divide="ignore"):
        log_p = np.log(own.weights.astype(np.float64)) if own.log_probs is None else own.log_probs
    if not recipe.selection.unbiased or own.log_probs is not None:
        ratio = np.exp(np.minimum(at_entries - np.where(own.weights > 0, log_p, 0), 0))
        means["acceptance"].add((own.weights * ratio).sum(axis=1))


def _value(loss: Loss, logits: mx.array, batch: Batch, rows: slice) -> npt.NDArray[np.float64]:
    """A distillation loss of some rows [n]."""
    constants = [getattr(batch, name)[rows] for name in loss.names]
    return np.array(on_tier(loss)(logits, *constants)[0], np.float64)


def _reverse_kl(recipe: Recipe, where: str) -> Loss | str:
    """The loss, or why there is none."""
    try:
        return loss_of(("reverse-kl",), recipe, 1.0, where)
    except IncompatibleStoreError as error:
        return str(error).partition(": ")[2].partition("; ")[0]


def _stated(means: dict[str, _Mean], manifest: Manifest, reverse: Loss | str, student: str) -> dict[str, Stated]:
    selection = manifest.recipe.selection
    own = "--tail-log-probs" if selection.kind == "threshold" else "--select threshold:16 --tail-log-probs"
    headed, five, positions = (means[name].count for name in ("agreement", "top5_agreement", "nll"))
    where = "" if headed == positions else f", over the {headed:,} positions whose likeliest token was kept"
    where_five = "" if five == positions else f", over the {five:,} positions of which five were kept"
    sampled = "unbiased estimate"
    bound, accepted = f"lower bound: {selection} and one cell for the rest", f"lower bound: over {selection} alone"
    if ASSUMED in manifest.unknown:  # its entries are too large
        bound = accepted = f"over {selection} alone, the tail assumed to be none"
    nll = means["nll"].value
    assert nll is not None
    return {
        "kl": Stated(means["kl"].value, f"{sampled}, entropy to 1/16 nat" if selection.unbiased else bound),
        "reverse_kl": Stated(
            means["reverse_kl"].value,
            f"needs `logitstore build {own}`: {reverse}"
            if isinstance(reverse, str)
            else (f"{sampled} over tokens that the teacher gives {FLOOR} or more" if selection.unbiased else bound),
        ),
        "agreement": Stated(
            means["agreement"].value,
            f"{selection} does not say which token is the likeliest"
            if selection.kind == "random"
            else f"exact to 1/16 nat{where}",
        ),
        "top5_agreement": Stated(
            means["top5_agreement"].value,
            f"exact to 1/16 nat{where_five}"
            if five
            else f"{selection} has five tokens of no position"
            if selection.kind == "top-k" and selection.k >= TOP
            else f"needs `logitstore build --select top-k:{TOP}` or more",
        ),
        "acceptance": Stated(
            means["acceptance"].value,
            f"needs `logitstore build {own}`"
            if means["acceptance"].value is None
            else (sampled if selection.unbiased else accepted),
        ),
        "perplexity": Stated(perplexity(nll, student), "exact"),
    }
