"""`logitstore vocab-map`: how much of what a store keeps a student with another tokenizer can use. Needs no MLX.

From the store and the student's tokenizer alone. Of each position, the share of its stored weights that stand on tokens
which the map takes to one of the student's; that is a share of what is stored, so of top-k's kept mass and of an
unbiased selection's whole. A student learns from the rest only that it is elsewhere.
"""

import heapq
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from logitstore.contract import Store
from logitstore.query import beginning
from logitstore.saved_maps import vocabulary_map_of
from logitstore.vocabulary import Vocabulary
from logitstore.vocabulary_map import VocabularyMap
from logitstore.zarr_store import MAP_PREFIX

WORST, HEAVIEST = 5, 10
BINS = 1_000
"""Of the histogram of positions from which the tenth percentile is read: it is exact to a thousandth."""


@dataclass(frozen=True)
class WorstDocument:
    """One of the documents of which the smallest share maps."""

    number: int
    """As `logitstore inspect --document` takes it."""
    share: float
    """Mean over its positions."""
    begins: str


@dataclass(frozen=True)
class Unmapped:
    """A token that the student has no equal of."""

    token_id: int
    text: str | None
    """None: an id that only pads the teacher's LM head."""
    share: float
    """Of all stored mass."""
    spelled_in: int
    """How many of the student's tokens spell it; 0 where it has no such link."""


@dataclass(frozen=True)
class Coverage:
    """What a map does for a store."""

    teacher: str
    """Its tokenizer's fingerprint, as the student's below."""
    student: str
    teacher_tokens: int
    """Ids that have a token; the counts below are of these."""
    student_tokens: int
    by_bytes: int
    """Tokens of text, mapped to one of the same bytes."""
    by_role: int
    """Special tokens, mapped to special ones of the same content or role."""
    spelled: int
    """Tokens without an equal that the student can spell."""
    documents: int
    positions: int
    mean: float | None
    """Mean over positions of the share of stored mass that maps; None where there are none."""
    p10: float | None
    """A tenth of the positions have no more, to a thousandth."""
    worst: tuple[WorstDocument, ...]
    heaviest: tuple[Unmapped, ...]
    computed: bool
    """Whether the map was computed now; else the store had it."""
    not_kept: str
    """Why the store does not keep it; "" where it does."""

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self) | {"worst": list(map(asdict, self.worst)), "heaviest": list(map(asdict, self.heaviest))}

    def to_text(self, store: object) -> str:
        """The same for people."""
        mapped = self.by_bytes + self.by_role
        percent = 100 * mapped / max(self.teacher_tokens, 1)
        kept = f"in {store}/{MAP_PREFIX}{self.student}" if not self.not_kept else f"nowhere: {self.not_kept}"
        lines = [
            f"teacher     {self.teacher} ({self.teacher_tokens:,} tokens)",
            f"student     {self.student} ({self.student_tokens:,} tokens)",
            f"map         {'computed now' if self.computed else 'read'}, kept {kept}",
            f"maps        {mapped:,} tokens ({percent:.1f} %): {self.by_bytes:,} by bytes, {self.by_role:,} by role",
            f"links       {self.spelled:,} others are spelled in the student's tokens",
        ]
        if self.mean is None or self.p10 is None:
            return "\n".join([*lines, "stored mass none: the store holds no position"])
        lines.append(
            f"stored mass {self.mean:.1%} of it maps, mean over {self.positions:,} positions; a tenth of them have "
            f"{self.p10:.1%} or less"
        )
        lines += ["", "documents of which least maps"]
        lines += [f"{each.share:>7.1%}  {each.number:>8}  {each.begins!r}" for each in self.worst]
        if self.heaviest:
            lines += ["", "heaviest tokens that do not map, share of all stored mass, and in how many they are spelled"]
        for each in self.heaviest:
            text = "no token" if each.text is None else repr(each.text)
            lines.append(f"{each.share:>7.2%}  {each.token_id:>8}  {text}  {each.spelled_in or '-'}")
        return "\n".join(lines)


def coverage(store: Store, student: Vocabulary, *, quiet: bool = False) -> Coverage:
    """Map a store's tokens to a student's, and measure by all that it holds at its first temperature.

    Raises:
        CorruptStoreError: the bytes are not those that were written.
        IncompatibleStoreError: the map that the store keeps is that of other tokenizers.
    """
    kept = vocabulary_map_of(store, student)
    made, teacher = kept.vocabulary_map, store.vocabulary
    meter = _Meter(made, store.manifest.recipe.vocab_size)
    worst: list[tuple[float, int]] = []
    for number in tqdm(range(len(store)), unit="doc", desc="vocab-map", delay=1, leave=False, disable=quiet):
        _, targets = store.document(number)
        share = meter.add(targets.ids, targets.weights)
        if share is not None:
            heapq.heappush(worst, (-share, -number))
            if len(worst) > WORST:
                heapq.heappop(worst)
    special = np.zeros(len(teacher), bool)
    special[[i for i in teacher.special_ids if i < len(teacher)]] = True
    mapped = made.student_ids >= 0
    return Coverage(
        teacher=made.teacher_fingerprint,
        student=made.student_fingerprint,
        teacher_tokens=sum(map(bool, teacher.tokens)),
        student_tokens=sum(map(bool, student.tokens)),
        by_bytes=int((mapped & ~special).sum()),
        by_role=int((mapped & special).sum()),
        spelled=int((made.link_lengths > 0).sum()),
        documents=len(store),
        positions=meter.positions,
        mean=meter.mean(),
        p10=meter.percentile(0.1),
        worst=tuple(
            WorstDocument(-n, -share, beginning(teacher, store.token_ids(-n).tolist()))
            for share, n in sorted(worst, reverse=True)
        ),
        heaviest=tuple(
            Unmapped(
                token_id=i,
                text=teacher.text(i) if i < len(teacher) and teacher.tokens[i] else None,
                share=share,
                spelled_in=int(made.link_lengths[i]) if i < len(made) else 0,
            )
            for i, share in meter.heaviest()
        ),
        computed=kept.computed,
        not_kept=kept.not_kept,
    )


class _Meter:
    """Adds up positions: a histogram of their shares, and the mass of each token that does not map."""

    def __init__(self, made: VocabularyMap, vocab_size: int) -> None:
        self._maps = made.of(np.arange(vocab_size)) >= 0
        self._missed = np.zeros(vocab_size)
        self._counts = np.zeros(BINS + 1, np.int64)
        self._sum = self._mass = 0.0
        self.positions = 0
        """Of those that have any mass."""

    def add(self, ids: npt.NDArray[np.uint32], weights: npt.NDArray[np.float32]) -> float | None:
        """A document's entries [P, k]; the mean share of its positions, None where none has mass."""
        mass = weights.astype(np.float64)
        maps = self._maps[ids]
        totals = mass.sum(axis=1)
        some = totals > 0
        shares = np.minimum((mass * maps).sum(axis=1)[some] / totals[some], 1)
        self._missed += np.bincount(ids[~maps], mass[~maps], minlength=len(self._missed))
        self._mass += float(totals.sum())
        if not len(shares):
            return None
        self._counts += np.bincount((shares * BINS + 1e-6).astype(np.int64), minlength=BINS + 1)
        self._sum += float(shares.sum())
        self.positions += len(shares)
        return float(shares.mean())

    def mean(self) -> float | None:
        return self._sum / self.positions if self.positions else None

    def percentile(self, q: float) -> float | None:
        if not self.positions:
            return None
        return int(np.searchsorted(np.cumsum(self._counts), q * self.positions)) / BINS

    def heaviest(self) -> list[tuple[int, float]]:
        """Ids that do not map, and their share of all mass, the heaviest first."""
        first = np.lexsort((np.arange(len(self._missed)), -self._missed))[:HEAVIEST]
        return [(int(i), float(self._missed[i] / self._mass)) for i in first if self._missed[i] > 0]
