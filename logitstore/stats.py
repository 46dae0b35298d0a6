"""What a store's targets look like: counts, lengths, shares and histograms of them, for `stats_report` to show.

One pass over the documents; what is held does not grow with them. Reads no store itself and asks no teacher.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from logitstore.targets import SparseTargets

ENTROPY_EDGES = np.arange(65, dtype=np.float64) * 0.25
"""Nats: 0 to 16 by 0.25."""
TAIL_MASS_EDGES = np.arange(51, dtype=np.float64) / 50
"""Probability: 0 to 1 by 0.02."""
LABEL_LOG_PROB_EDGES = ENTROPY_EDGES - 16
"""Nats: -16 to 0 by 0.25."""


@dataclass(frozen=True)
class Histogram:
    """How many values lie between neighbouring edges, and their mean.

    A bin holds its lower edge, the last one both. A value beyond the edges counts in the bin nearest to it.
    """

    title: str
    unit: str
    edges: tuple[float, ...]
    """[n + 1]; of whole numbers, i - 1/2 and i + 1/2 around each."""
    counts: tuple[int, ...]
    """[n]"""
    mean: float | None


@dataclass(frozen=True)
class StoreStats:
    """What `collect` found. Means and shares are None where there is nothing to take them of."""

    name: str
    about: Mapping[str, str]
    """What made the store, in words; shown as it is."""
    documents: int
    positions: int
    shortest: int | None
    """Tokens of the shortest document."""
    longest: int | None
    median_between: tuple[int, int] | None
    """The median length lies between these two: known to a power of two."""
    lengths: tuple[int, ...]
    """How many documents have 0, 1, 2 to 3, 4 to 7, ... tokens."""
    teacher_perplexity: float | None
    """exp(-mean label log-prob): the teacher's perplexity on the stored labels."""
    label_in_head: float | None
    """Share of positions whose label is an entry of the head."""
    label_in_tail: float | None
    """Share of positions whose label is an entry drawn from the tail."""
    entropy: Histogram
    tail_mass: Histogram
    label_log_prob: Histogram
    head_entries: Histogram
    entries: Histogram
    """Entries with a weight above 0, head and tail."""
    plane_bytes: Mapping[str, int]
    fidelity: Mapping[str, Any] | None

    @property
    def disk_bytes(self) -> int:
        """All planes together."""
        return sum(self.plane_bytes.values())

    @property
    def histograms(self) -> tuple[Histogram, ...]:
        """Every histogram, in the order shown."""
        return self.entropy, self.tail_mass, self.label_log_prob, self.head_entries, self.entries

    def per_token(self, size_bytes: int) -> float | None:
        """Bytes per position."""
        return size_bytes / self.positions if self.positions else None


@dataclass
class _Tally:
    """A histogram that is being filled."""

    edges: npt.NDArray[np.float64]
    total: float = 0.0
    counts: npt.NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        self.counts = np.zeros(len(self.edges) - 1, np.int64)

    def add(self, values: npt.NDArray[Any]) -> None:
        """Count values float or whole [P]."""
        bins = np.searchsorted(self.edges, values, side="right") - 1
        self.counts += np.bincount(bins.clip(0, len(self.counts) - 1), minlength=len(self.counts))
        self.total += float(values.sum(dtype=np.float64))

    def widen(self, most: int) -> None:
        """Make room for whole numbers 0 .. most."""
        if (missing := most + 1 - len(self.counts)) > 0:
            self.edges = _whole_edges(most)
            self.counts = np.pad(self.counts, (0, missing))

    def histogram(self, title: str, unit: str) -> Histogram:
        mean = ratio(self.total, int(self.counts.sum()))
        return Histogram(title, unit, tuple(self.edges.tolist()), tuple(self.counts.tolist()), mean)


class Collection:
    """What `collect` counts, a document at a time: for those that cannot read all of them at once."""

    def __init__(self) -> None:
        self._entropy, self._tail_mass, self._label = map(
            _Tally, (ENTROPY_EDGES, TAIL_MASS_EDGES, LABEL_LOG_PROB_EDGES)
        )
        self._heads, self._entries = _Tally(_whole_edges(0)), _Tally(_whole_edges(0))
        self._lengths = np.zeros(65, np.int64)
        self._shortest: int | None = None
        self._longest: int | None = None
        self._in_head = self._in_tail = 0

    def add(self, token_ids: npt.NDArray[np.integer[Any]], targets: SparseTargets) -> None:
        """Count a document: token ids [L], and its targets."""
        length = len(token_ids)
        self._lengths[length.bit_length()] += 1
        self._shortest = length if self._shortest is None else min(self._shortest, length)
        self._longest = length if self._longest is None else max(self._longest, length)
        self._entropy.add(targets.entropy)
        self._tail_mass.add(np.exp(targets.log_tail_mass.astype(np.float64)))
        self._label.add(targets.label_log_prob)
        k = targets.ids.shape[1]
        kept = targets.weights > 0
        for tally, values in ((self._heads, targets.head_count), (self._entries, kept.sum(axis=1))):
            tally.widen(k)
            tally.add(values)
        labels = np.asarray(token_ids)[targets.positions + 1]
        is_label = kept & (targets.ids == labels[:, None])
        is_head = targets.in_head
        self._in_head += int((is_label & is_head).any(axis=1).sum())
        self._in_tail += int((is_label & ~is_head).any(axis=1).sum())

    def stats(
        self,
        plane_bytes: Mapping[str, int],
        fidelity: Mapping[str, Any] | None = None,
        *,
        name: str = "store",
        about: Mapping[str, str] | None = None,
    ) -> StoreStats:
        """What was counted so far; arguments as for `collect`."""
        positions = int(self._entropy.counts.sum())
        mean_label = ratio(self._label.total, positions)
        return StoreStats(
            name=name,
            about=dict(about or {}),
            documents=int(self._lengths.sum()),
            positions=positions,
            shortest=self._shortest,
            longest=self._longest,
            median_between=_median_between(self._lengths, self._shortest, self._longest),
            lengths=tuple(np.trim_zeros(self._lengths, "b").tolist()),
            teacher_perplexity=None if mean_label is None or mean_label < -700 else math.exp(-mean_label),
            label_in_head=ratio(self._in_head, positions),
            label_in_tail=ratio(self._in_tail, positions),
            entropy=self._entropy.histogram("Entropy", "nats"),
            tail_mass=self._tail_mass.histogram("Tail mass", "probability outside the head"),
            label_log_prob=self._label.histogram("Label log-prob", "nats"),
            head_entries=self._heads.histogram("Head entries", "entries kept exactly"),
            entries=self._entries.histogram("All entries", "entries with a weight above 0"),
            plane_bytes=dict(plane_bytes),
            fidelity=None if fidelity is None else _finite(fidelity),
        )


def collect(
    documents: Iterable[tuple[npt.NDArray[np.integer[Any]], SparseTargets]],
    plane_bytes: Mapping[str, int],
    fidelity: Mapping[str, Any] | None = None,
    *,
    name: str = "store",
    about: Mapping[str, str] | None = None,
) -> StoreStats:
    """Go once over documents: (token ids [L], their targets).

    Args:
        plane_bytes: size of each part of the store, in the order to show them. Together: everything on disk.
        fidelity: `logitstore.fidelity.Fidelity.to_json()`, or None where none was measured. Its `angles`, [positions,
            degrees] each, become a plot; numbers of other names are shown as they are.
        name: of the store; the title.
        about: what made the store (teacher, selection), shown below the title.
    """
    collection = Collection()
    for token_ids, targets in documents:
        collection.add(token_ids, targets)
    return collection.stats(plane_bytes, fidelity, name=name, about=about)


def _whole_edges(most: int) -> npt.NDArray[np.float64]:
    return np.arange(most + 2, dtype=np.float64) - 0.5


def ratio(part: float, whole: int) -> float | None:
    """The part of the whole; None where there is no whole, or the part is no number."""
    return part / whole if whole and math.isfinite(part) else None


def span(bits: int) -> tuple[int, int]:
    """The least and the greatest number of so many bits."""
    return (1 << bits) >> 1, (1 << bits) - 1


def _median_between(
    lengths: npt.NDArray[np.int64], shortest: int | None, longest: int | None
) -> tuple[int, int] | None:
    """Where the median lies, from counts by powers of two: between the two middle documents' bins."""
    if shortest is None or longest is None:
        return None
    seen, documents = np.cumsum(lengths), int(lengths.sum())
    lower, upper = (int(np.searchsorted(seen, rank, side="right")) for rank in ((documents - 1) // 2, documents // 2))
    return max(span(lower)[0], shortest), min(span(upper)[1], longest)


def _finite(value: Any) -> Any:
    """JSON values with null for what is no finite number."""
    match value:
        case Mapping():
            return {str(key): _finite(item) for key, item in value.items()}
        case list() | tuple():
            return [_finite(item) for item in value]
        case float() if not math.isfinite(value):
            return None
    return value
