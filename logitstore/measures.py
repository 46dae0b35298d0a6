"""What a store's targets say of a document as a whole: how well its teacher foretold it, and how sure the teacher was.

All are means over positions: those that a run trains, or all. For `logitstore query` and for the trainer's choice of
documents; reads no store itself.

    length         tokens of the document
    nll            mean of -log p(label), nats: the log of the teacher's perplexity
    entropy        mean entropy of the teacher's distribution, nats
    correct        share of positions whose label is the teacher's likeliest token
    disagreement   share of positions whose label is not: 1 - correct
    tail_mass      mean of the probability outside the head

The likeliest token is the head entry of the largest weight. Weights are on a grid of 1/16 nat, rounded up or down at
random, so of two tokens that lie nearer to each other than that either may be taken; a label that shares the first
place counts as correct. Where the head is empty, no token has more than 1/k, and no label is correct.
A store keeps log p(label) to the nearest 1/16 and -15.875 at least, which bounds nll.
"""

import difflib
import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from logitstore.errors import ConfigError
from logitstore.manifest import Manifest
from logitstore.targets import SparseTargets

NAMES = ("length", "nll", "entropy", "correct", "disagreement", "tail_mass")
UNKNOWN_LABEL = "label log-prob where the label was not kept"
"""What a manifest calls it where an imported cache says nothing of some labels."""
ASSUMED = "tail mass (assumed to be none)"
"""What a manifest calls it where an imported cache scaled its entries to sum to 1."""


@dataclass(frozen=True)
class Measures:
    """Of one document; NaN where a measure is not known."""

    positions: int
    """How many the means are taken over."""
    length: int
    nll: float
    entropy: float
    correct: float
    tail_mass: float = math.nan

    @property
    def disagreement(self) -> float:
        """1 - correct."""
        return 1 - self.correct

    def value(self, name: str) -> float:
        """One of them, by a name of `NAMES`."""
        return float(getattr(self, name))

    def without(self, names: Iterable[str]) -> "Measures":
        """The same with some not known."""
        lacking = set(names)
        values = (
            math.nan if name in lacking else self.value(name) for name in ("nll", "entropy", "correct", "tail_mass")
        )
        return Measures(self.positions, self.length, *values)


def measure(
    token_ids: npt.NDArray[np.integer], targets: SparseTargets, trained: npt.NDArray[np.bool_] | None = None
) -> Measures:
    """Measure a document of L tokens by its targets at the first P of its positions.

    Args:
        trained: [L - 1]; over which positions, by default all. NaN where none of the P is.
    """
    chosen = np.ones(len(targets), np.bool_) if trained is None else trained[: len(targets)]
    positions = int(np.count_nonzero(chosen))
    if not positions:
        return Measures(0, len(token_ids), math.nan, math.nan, math.nan, math.nan)
    correct = label_is_likeliest(token_ids, targets)
    columns = (-targets.label_log_prob, targets.entropy, correct, np.exp(targets.log_tail_mass))
    means = (float(values[chosen].mean(dtype=np.float64)) for values in columns)
    return Measures(positions, len(token_ids), *means)


def label_is_likeliest(token_ids: npt.NDArray[np.integer], targets: SparseTargets) -> npt.NDArray[np.bool_]:
    """Whether no head entry outweighs the label, which is one: [P]."""
    labels = np.asarray(token_ids)[targets.positions + 1]
    head = np.where(targets.in_head, targets.weights, 0)
    of_label = np.where(targets.ids == labels[:, None], head, 0).max(axis=1)
    return np.asarray((of_label > 0) & (of_label >= head.max(axis=1)))


def unknown_labels(
    targets: SparseTargets, labels: npt.NDArray[np.integer], manifest: Manifest
) -> npt.NDArray[np.bool_]:
    """Of which of N positions with these labels [N] the store does not know the label's log-prob, [N]."""
    if UNKNOWN_LABEL not in manifest.unknown:
        return np.zeros(len(targets), np.bool_)
    kept = (targets.ids == labels[:, None]) & (targets.weights > 0)
    return np.asarray(~kept.any(axis=1))


def unknown(manifest: Manifest) -> dict[str, str]:
    """The measures that a store cannot give, and why."""
    found = {}
    if manifest.recipe.selection.kind == "random":
        found = dict.fromkeys(
            ("correct", "disagreement", "tail_mass"),
            f"{manifest.recipe.selection} counts draws, and keeps no token as one of the likeliest",
        )
    if UNKNOWN_LABEL in manifest.unknown:
        found["nll"] = f"{manifest.imported} keeps no log-prob of a label beyond its own entries"
    if "entropy" in manifest.unknown:
        found["entropy"] = f"{manifest.imported} keeps no entropy"
    return found


def require_known(manifest: Manifest, names: Iterable[str], where: object) -> None:
    """Check that a store gives these measures.

    Raises:
        ConfigError: naming those that it gives.
    """
    lacking = unknown(manifest)
    for name in names:
        if name in lacking:
            others = ", ".join(other for other in NAMES if other not in lacking)
            raise ConfigError(f"{where} does not know {name}: {lacking[name]}; type one of {others}")


def require_name(name: str, typed: str) -> None:
    """Check that a measure is one of `NAMES`.

    Raises:
        ConfigError: with the nearest; `typed` is what the user wrote, as in "--sort nl".
    """
    if name not in NAMES:
        nearest = difflib.get_close_matches(name, NAMES, 1, cutoff=0)[0]
        raise ConfigError(f"{typed} names no measure; did you mean {nearest}? They are {', '.join(NAMES)}")
