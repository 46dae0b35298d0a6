"""Documents and targets to arrays: padded tokens, and one flat row for every trained position.

This is where the shift ends up: row (b, t) holds the targets of position t of document b, and the label is token t + 1.
Padding, prompts and skipped positions have no row, so they cost no logits and touch no gradient.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, count
from typing import Any, NamedTuple

import distill_kernels  # noqa: F401  loads a fast BLAS before MLX

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from distill_trainer.draw import Draw
from distill_trainer.kinds import OnMiss
from distill_trainer.packing import rows_of
from distill_trainer.spans import in_whole_spans, span_rows
from distill_trainer.weights import entropy_factors
from logitstore.sequences import TokenSequence
from logitstore.targets import SparseTargets

BUCKET_BATCHES = 8
"""Documents of this many batches are sorted by length together, so that a batch pads little."""


class Beside(NamedTuple):
    """What a method of `distill_trainer.method` has of the teacher for a batch."""

    weights: mx.array
    """float32 [N]; the rows' weights, 0 where the teacher said nothing."""
    arrays: tuple[mx.array, ...]


class Batch(NamedTuple):
    """N trained positions of B documents, padded to T positions."""

    tokens: mx.array
    """int32 [B, T]"""
    rows: mx.array
    """int32 [N]; b * T + t of each trained position."""
    labels: mx.array
    """int32 [N]"""
    ids: mx.array
    """uint32 [N, k]"""
    weights: mx.array
    """float32 [N, k]; zero where a position has no targets."""
    log_probs: mx.array
    """float32 [N, k]; the entries' own log-probs, where the store keeps them, else 0."""
    log_tail_mass: mx.array
    """float32 [N]"""
    kd_weight: mx.array
    """float32 [N]; weight of the distillation term."""
    ce_weight: mx.array
    """float32 [N]; weight of the cross-entropy."""
    row_weights: mx.array | None = None
    """float32 [N]; what kd_weight and ce_weight were multiplied by, above 0. None: 1 everywhere."""
    beside: tuple[Beside, ...] = ()
    """One for each method of the run."""
    spans: mx.array | None = None
    """int32 [N]; where rows are taught together, the last row of those that each belongs to, -1 for none."""
    span_log_prob: mx.array | None = None
    """float32 [N]; the teacher's log-prob of a span, at its last row; for `gold` of the span without its last token."""
    documents: mx.array | None = None
    """int32 [B, T]; where rows hold several documents, which of them each position belongs to, -1 for padding."""

    @property
    def taught(self) -> mx.array:
        """How many rows have targets, alone or in a span."""
        return (self.kd_weight > 0 if self.spans is None else self.spans >= 0).sum()

    @property
    def each_weight(self) -> mx.array:
        """float32 [N]; what each row weighs."""
        return mx.ones(len(self.rows)) if self.row_weights is None else self.row_weights

    @property
    def weight(self) -> mx.array | int:
        """What the batch weighs in a mean over several: the sum of its rows' weights."""
        return len(self.rows) if self.row_weights is None else self.row_weights.sum()

    @property
    def answered_weight(self) -> mx.array:
        """The same of its rows with targets."""
        answered = self.kd_weight > 0
        return answered.sum() if self.row_weights is None else mx.where(answered, self.row_weights, 0).sum()

    def times(self, factor: float) -> "Batch":
        """The batch whose total loss is so many times as large, all of its means being the same."""
        beside = tuple(each._replace(weights=each.weights * factor) for each in self.beside)
        return self._replace(kd_weight=self.kd_weight * factor, ce_weight=self.ce_weight * factor, beside=beside)


@dataclass(frozen=True)
class Weighing:
    """How a position's two losses are weighed: alpha and 1 - alpha with targets; without, by the miss policy."""

    alpha: float
    on_miss: OnMiss
    entropy_weight: float = 0.0
    """See `weights.entropy_factors`."""
    ce: float = 1.0
    """What the cross-entropy is multiplied by."""


def epochs(
    lengths: Sequence[int], batch_size: int, seed: int, draw: Draw | None = None
) -> Iterator[tuple[int, list[int]]]:
    """Endless batches, as (epoch, document numbers): each epoch a new order, near lengths together, none dropped.

    Args:
        draw: which documents an epoch takes; by default each once. Where it gives them by rank, the buckets stay in
            that order, and the batches of each are shuffled.
    """
    rng = np.random.default_rng(seed)
    for epoch in count():
        order, ranked = (rng.permutation(len(lengths)), False) if draw is None else draw.epoch(rng, epoch)
        bucket = batch_size * BUCKET_BATCHES
        buckets: list[list[list[int]]] = []
        for at in range(0, len(order), bucket):
            near = sorted(order[at : at + bucket].tolist(), key=lambda i: lengths[i])
            buckets.append([near[i : i + batch_size] for i in range(0, len(near), batch_size)])
        for batches in buckets if ranked else [list(chain.from_iterable(buckets))]:
            for i in rng.permutation(len(batches)):
                yield epoch, batches[i]


def collate(
    sequences: Sequence[TokenSequence],
    targets: Sequence[SparseTargets | None],
    weighing: Weighing,
    longest: int | None = None,
) -> Batch | None:
    """Make one batch; None where the policy "skip" leaves no position to train.

    Args:
        longest: several documents may share a row of at most so many positions; None: none do.
    """
    places = rows_of([len(s.trained) for s in sequences], longest)
    t_max = max(start + len(s.trained) for (_, start), s in zip(places, sequences, strict=True))
    k = max((t.ids.shape[1] for t in targets if t is not None), default=1)
    tokens = np.zeros((1 + max(b for b, _ in places), t_max), np.int32)
    documents = np.full_like(tokens, -1)
    parts: list[dict[str, npt.NDArray[Any]]] = []
    weighs = weighing.entropy_weight > 0 or any(s.weights is not None for s in sequences)
    done = 0
    for number, (sequence, target, (b, start)) in enumerate(zip(sequences, targets, places, strict=True)):
        tokens[b, start : start + len(sequence.trained)] = sequence.token_ids[:-1]
        documents[b, start : start + len(sequence.trained)] = number
        positions, answered = _trained(sequence, target)
        if weighing.on_miss == "skip":
            positions, answered = positions[answered], answered[answered]
        if not len(positions):
            continue
        n = len(positions)
        part = {"rows": b * t_max + start + positions, "labels": sequence.token_ids[positions + 1]}
        part |= _entries(target, positions, answered, k)
        alpha = np.where(answered, np.float32(weighing.alpha), np.float32(0))
        part["kd_weight"], part["ce_weight"] = alpha, np.float32(weighing.ce) * (1 - alpha)
        if sequence.asked is not None and sequence.asked.spans is not None:
            part |= span_rows(sequence.asked.spans, positions, answered, target, done)
            part["kd_weight"] = np.where(part["spans"] == done + np.arange(n), alpha, np.float32(0))
        if weighs:
            w = np.ones(n, np.float32) if sequence.weights is None else sequence.weights[positions]
            if weighing.entropy_weight:
                w = np.where(answered, w * entropy_factors(target, positions, weighing.entropy_weight), w)
            part |= {"kd_weight": part["kd_weight"] * w, "ce_weight": part["ce_weight"] * w, "row_weights": w}
        parts.append(part)
        done += n
    if not parts:
        return None
    columns: dict[str, Any] = {name: mx.array(np.concatenate([part[name] for part in parts])) for name in parts[0]}
    batch = Batch(mx.array(tokens), **columns | {"rows": columns["rows"].astype(mx.int32)})
    return batch if len(tokens) == len(sequences) else batch._replace(documents=mx.array(documents))


def _trained(
    sequence: TokenSequence, target: SparseTargets | None
) -> tuple[npt.NDArray[np.integer], npt.NDArray[np.bool_]]:
    """A document's trained positions [n], rising, and which of them its targets teach [n]."""
    positions = np.flatnonzero(sequence.trained)
    answered = positions < (0 if target is None else len(target))
    asked = sequence.asked
    if asked is not None and asked.taught is not None:
        answered &= asked.taught[positions]
    if asked is not None and asked.spans is not None:
        answered &= in_whole_spans(asked.spans, positions[answered], positions)
    return positions, answered


def _entries(
    target: SparseTargets | None, positions: npt.NDArray[np.integer], answered: npt.NDArray[np.bool_], k: int
) -> dict[str, npt.NDArray[Any]]:
    """What a batch's rows have of a document's targets, in k entries each; zeros where they are not answered."""
    n, at = len(positions), positions[answered]
    ids, log_tail_mass = np.zeros((n, k), np.uint32), np.zeros(n, np.float32)
    weights, log_probs = np.zeros((n, k), np.float32), np.zeros((n, k), np.float32)
    if target is not None:
        own = slice(target.ids.shape[1])  # another document's store may keep more
        ids[answered, own], weights[answered, own] = target.ids[at], target.weights[at]
        log_tail_mass[answered] = target.log_tail_mass[at]
        if target.log_probs is not None:
            log_probs[answered, own] = target.log_probs[at]
    return {"ids": ids, "weights": weights, "log_probs": log_probs, "log_tail_mass": log_tail_mass}
