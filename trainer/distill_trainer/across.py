"""A teacher with another tokenizer than the student's: what it said of the same text, at the student's positions.

Two positions speak of the same when the tokens up to them end at the same byte of the text (`logitstore.alignment`).
There are four ways to learn from that, each from a store alone:

    mapped   at such a position the teacher's entries become those of the student's tokens with the same bytes. What it
             gave to tokens that the student lacks goes to the cell of the rest: of a truncated teacher the tail, of a
             sample all of the student's tokens that the teacher lacks, which the loss sees as one (`MergedLoss`)
    span     between two such positions the likelihood of the text is compared, which is the product over the tokens of
             each side (`span_divergence`); every position between takes part
    uld      where `mapped` has targets, but the teacher's probabilities are taken without their names, in order
             (`SortedL1`)
    gold     between two such positions both sides' distributions over what ends the span, times the probability of what
             comes before in it: tokens with a name by it, the others in order (`gold_divergence`). Names are exact
             here: a token that the student spells in pieces has none, as its first piece would end elsewhere

Other positions have no targets. A document's alignment stands in its `asked`, as that of another prompt does.
"""

from dataclasses import dataclass, replace

from distill_kernels import LogitsLoss, WeightedLoss
from distill_kernels.merged import MergedLoss
from distill_kernels.sorted_l1 import SortedL1

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from distill_trainer.mixture import summed_by_id
from distill_trainer.spans import GoldLoss
from logitstore.alignment import Alignment
from logitstore.asked import Asked
from logitstore.targets import SparseTargets
from logitstore.vocabulary import Vocabulary
from logitstore.vocabulary_map import VocabularyMap

Ints = npt.NDArray[np.int32]
NOWHERE = np.iinfo(np.int32).max
"""Stands for a position that no teacher answers."""


@dataclass(frozen=True, eq=False)
class Naming:
    """How the student calls the teacher's tokens."""

    student_ids: Ints
    """[V_t]; the student's token that says the same, -1 where there is none."""
    real: npt.NDArray[np.bool_]
    """[V_s]; the columns of the student's head that are tokens."""
    unnamed: npt.NDArray[np.bool_]
    """[V_s]; the student's tokens that are none of the teacher's."""
    cell: int | None
    """The id that stands for all of them in a sample. None where every token of the teacher has a name; and where every
    one of the student's is the teacher's: then nothing is left that mass without a name could go to, and it is dropped.
    """

    @classmethod
    def of(
        cls, found: VocabularyMap, teacher: Vocabulary, student: Vocabulary, width: int, *, links: bool = True
    ) -> "Naming":
        """Of a map, for a student whose head has so many columns; padding is no token of either.

        Args:
            links: a token that the student spells in pieces goes by the first of them; else it has no name.
        """
        student_ids = found.student_ids
        if links:
            student_ids = np.where(student_ids >= 0, student_ids, found.first_pieces)
        student_ids = np.where(student_ids < width, student_ids, -1).astype(np.int32)
        tokens = np.array([bool(token) for token in teacher.tokens])
        lacking = bool((student_ids[: len(tokens)][tokens] < 0).any())
        real = np.zeros(width, np.bool_)
        real[: len(student)] = [bool(token) for token in student.tokens[:width]]
        unnamed = real.copy()
        unnamed[student_ids[student_ids >= 0]] = False
        return cls(student_ids, real, unnamed, int(unnamed.argmax()) if lacking and unnamed.any() else None)

    def renamed(self, targets: SparseTargets, *, unbiased: bool) -> SparseTargets:
        """The teacher's entries as the student's, [P, k + 1]: ids ascending in a row, empty places last.

        Args:
            unbiased: they are a sample; else truncated.
        """
        names = self._names_of(targets.ids)
        named = names >= 0
        weights = targets.weights.astype(np.float64)
        lost = np.where(named, 0, weights).sum(axis=1)
        names, weights = np.where(named, names, 0), np.where(named, weights, 0)
        log_tail = targets.log_tail_mass
        to_cell = lost if unbiased and self.cell is not None else np.zeros(len(targets))
        if not unbiased:
            with np.errstate(divide="ignore"):
                log_tail = np.log(np.exp(log_tail.astype(np.float64)) + lost).astype(np.float32)
        cell = np.full((len(targets), 1), self.cell or 0)
        ids, weights = np.concatenate([names, cell], axis=1), np.concatenate([weights, to_cell[:, None]], axis=1)
        return replace(_with_entries(targets, ids, weights), log_tail_mass=log_tail)

    def parted(self, targets: SparseTargets) -> SparseTargets:
        """The teacher's entries, truncated, as `distill_kernels.gold` has them: [P, k], ids ascending in a row. One
        without a name has the id V_s + r, r being its rank among those of its row.
        """
        names, weights = self._names_of(targets.ids), targets.weights.astype(np.float64)
        order = np.where(names < 0, -weights, 1).argsort(axis=1, kind="stable")
        ranks = order.argsort(axis=1)
        return _with_entries(targets, np.where(names >= 0, names, len(self.real) + ranks), weights)

    def named_mass(self, targets: SparseTargets) -> npt.NDArray[np.float64]:
        """Share of each position's kept weights that have a name: float64 [P]."""
        weights = targets.weights.astype(np.float64)
        return np.asarray(np.where(self._names_of(targets.ids) >= 0, weights, 0).sum(axis=1) / weights.sum(axis=1))

    def _names_of(self, token_ids: npt.NDArray[np.integer]) -> Ints:
        """The student's ids, of any shape; -1 for a token without a name and for padding of the teacher's head."""
        known = token_ids < len(self.student_ids)
        return np.where(known, self.student_ids[np.where(known, token_ids, 0)], -1).astype(np.int32)

    def loss(self, loss: LogitsLoss | WeightedLoss, *, unbiased: bool) -> LogitsLoss | WeightedLoss | MergedLoss:
        """The loss of targets that `renamed` has made, in place of the loss of the teacher's own."""
        if not unbiased or self.cell is None:
            return loss
        return MergedLoss(loss, mx.array(self.unnamed), self.cell)

    def sorted_loss(self, temperature: float) -> SortedL1:
        """The loss of `uld`."""
        return SortedL1(mx.array(self.real), int(self.real.sum()), temperature)

    def gold_loss(self, temperature: float) -> GoldLoss:
        """The loss of `gold`, of targets that `parted` has made."""
        return GoldLoss(mx.array(self.unnamed), int(self.unnamed.sum()), temperature)


@dataclass(frozen=True, eq=False, kw_only=True)
class MappedAsked(Asked):
    """The teacher's document, position by position where both have read the same."""

    naming: Naming
    unbiased: bool

    def shifted(self, targets: SparseTargets) -> SparseTargets:
        """The teacher's answer at the student's positions, by the student's names; nobody reads it where they do not
        meet.
        """
        return self.naming.renamed(super().shifted(targets), unbiased=self.unbiased)


@dataclass(frozen=True, eq=False, kw_only=True)
class SpanAsked(Asked):
    """The teacher's document, span by span."""

    starts: Ints
    """[L - 1]; at the last position of a span the teacher's first, else 0."""

    def shifted(self, targets: SparseTargets) -> SparseTargets:
        """Targets whose `label_log_prob` at a span's last position is that of the whole span."""
        found = super().shifted(targets)
        sums = np.concatenate([[0.0], np.cumsum(targets.label_log_prob, dtype=np.float64)])
        n = len(found)
        whole = sums[self.positions[:n] + 1] - sums[self.starts[:n]]
        return replace(found, label_log_prob=whole.astype(np.float32))


@dataclass(frozen=True, eq=False, kw_only=True)
class GoldAsked(SpanAsked):
    """The teacher's document, span by span, and its entries at the last position of each."""

    naming: Naming

    def shifted(self, targets: SparseTargets) -> SparseTargets:
        """Targets that at a span's last position are the teacher's at its own last one, by the student's names, with
        the `label_log_prob` of the span without its last token: 0 where it is one token.
        """
        found = super().shifted(targets)
        before = found.label_log_prob - targets.label_log_prob[self.positions[: len(found)]]
        return replace(self.naming.parted(found), label_log_prob=before)


def mapped_asked(token_ids: Ints, alignment: Alignment, naming: Naming, *, unbiased: bool) -> MappedAsked:
    """A document for `mapped`.

    Args:
        token_ids: the teacher's.
        alignment: of the student's document with it.
    """
    met = alignment.going_on
    positions = _never_falling(np.maximum(met, 0), alignment)
    return MappedAsked(token_ids, positions, taught=met >= 0, naming=naming, unbiased=unbiased)


def span_asked(token_ids: Ints, alignment: Alignment) -> SpanAsked:
    """The same for `span`."""
    met = alignment.met
    at = np.flatnonzero(met >= 0)
    n = len(met) - 1
    spans, positions, starts = np.full(n, -1, np.int32), np.zeros(n, np.int32), np.zeros(n, np.int32)
    for first, end in zip(at[:-1].tolist(), at[1:].tolist(), strict=True):
        spans[first:end] = end - 1
        positions[first:end] = met[end] - 1
        starts[end - 1] = met[first]
    return SpanAsked(token_ids, _never_falling(positions, alignment), taught=spans >= 0, spans=spans, starts=starts)


def uld_asked(token_ids: Ints, alignment: Alignment) -> Asked:
    """The same for `uld`."""
    met = alignment.going_on
    return Asked(token_ids, _never_falling(np.maximum(met, 0), alignment), taught=met >= 0)


def gold_asked(token_ids: Ints, alignment: Alignment, naming: Naming) -> GoldAsked:
    """The same for `gold`; `naming` without links."""
    return GoldAsked(**vars(span_asked(token_ids, alignment)), naming=naming)


def unknown_asked(length: int, *, spans: bool) -> Asked:
    """A document of L tokens that nobody knows."""
    positions = np.full(length - 1, NOWHERE, np.int32)
    return Asked(
        np.zeros(1, np.int32),
        positions,
        taught=np.zeros(length - 1, np.bool_),
        spans=np.full(length - 1, -1, np.int32) if spans else None,
    )


def _with_entries(
    targets: SparseTargets, ids: npt.NDArray[np.integer], weights: npt.NDArray[np.float64]
) -> SparseTargets:
    """Targets with other entries [P, k]: those of one id made one, in no head, and none with a log-prob of its own."""
    ids, weights = summed_by_id(ids.astype(np.uint32), weights)
    no_head = np.zeros_like(targets.head_count)
    return replace(targets, ids=ids, weights=weights.astype(np.float32), head_count=no_head, log_probs=None)


def _never_falling(needed: Ints, alignment: Alignment) -> Ints:
    """[L - 1]; the last of the teacher's positions that is needed up to each of the student's."""
    return np.maximum.accumulate(np.where(alignment.beyond[:-1], NOWHERE, needed)).astype(np.int32)
