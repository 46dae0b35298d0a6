"""Where a document's targets come from: the stores in order, services' teachers, the live teacher, or nobody.

A miss is decided and counted position by position, and handled by the run's policy. What the teacher answers goes
through the same recipe as a build, so it is what the store would have said; with a writer it is kept for the next run.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import numpy.typing as npt

from distill_trainer.kinds import OnMiss
from distill_trainer.live_teacher import LiveTeacher
from distill_trainer.teachers import Teachers
from logitstore.contract import Writer
from logitstore.errors import MissingTargetsError
from logitstore.key import document_key
from logitstore.plan import shard_positions
from logitstore.recipe import Recipe
from logitstore.sequences import TokenSequence
from logitstore.served_store import ServedStore
from logitstore.targets import SparseTargets
from logitstore.teacher import Teacher


@dataclass
class Count:
    """Trained positions that the stores answered, and those they did not."""

    hits: int = 0
    misses: int = 0
    unasked: int = 0
    """Of the misses, those that a live teacher was not asked for, being too far into the document."""
    failed: int = 0
    """Of the misses, those that a live teacher was to answer and did not: lost, or without a number to say."""
    by_service: int = 0
    """Of the misses, those that a service's teacher answered."""
    on_policy: int = 0
    """Batches of the student's own completions, whose positions are among these too."""
    generated: int = 0
    """Tokens of these completions."""

    def __add__(self, other: "Count") -> "Count":
        return Count(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


class TargetSource:
    """Answers for documents.

    Args:
        teachers: who answers from stores, with this recipe.
        on_miss: "error" with no teacher; with one, what is done where it does not answer: "online" stops the run.
        teacher: asked on a miss.
        writer: keeps the teacher's answers.
        max_teacher_length: tokens of a document that the teacher is given; positions after them have no targets.
        say: takes the one line that the teacher is lost.
    """

    def __init__(
        self,
        teachers: Teachers,
        recipe: Recipe,
        on_miss: OnMiss,
        teacher: Teacher | None = None,
        writer: Writer | None = None,
        max_teacher_length: int | None = None,
        say: Callable[[str], object] = lambda _: None,
    ) -> None:
        self.recipe = recipe
        self.on_miss = on_miss
        self._teachers = teachers
        self.teacher = teacher
        self._teacher = None if teacher is None else LiveTeacher(teacher, on_miss, say)
        self._writer = writer
        self._most = max_teacher_length
        self._services = [s for s in teachers.stores if isinstance(s, ServedStore)] if teachers.in_order else []

    @property
    def asks_services(self) -> bool:
        """Whether a service's teacher is asked on a miss, before any other."""
        return any(service.teaches for service in self._services)

    @property
    def asks(self) -> bool:
        """Whether a teacher is asked on a miss."""
        return self._teacher is not None

    @property
    def lost(self) -> bool:
        """Whether that teacher answers no more."""
        return self._teacher is not None and self._teacher.lost

    def missing(self, sequences: Sequence[TokenSequence]) -> int:
        """How many of these documents have a trained position that the stores do not answer; reads no values."""
        return sum(bool(s.trained[self._answered(s) :].any()) for s in sequences)

    def beyond(self, sequences: Sequence[TokenSequence]) -> int:
        """How many trained positions neither the stores answer nor the teacher will be asked for; reads no values."""
        return sum(int(s.trained[max(self._answered(s), self._reach(s)) :].sum()) for s in sequences)

    def answer(
        self, sequences: Sequence[TokenSequence], epoch: int = 0, temperature: float | None = None
    ) -> tuple[list[SparseTargets | None], Count]:
        """Targets of each document by the run's policy: of all of its positions, of the first ones, or None.

        Args:
            epoch: which of several stored draws is read.
            temperature: which of the recipe's; by default the first.

        Raises:
            MissingTargetsError: a miss under the policy "error".
            TeacherLostError, UnusableLogitsError: as `LiveTeacher.records`.
            CorruptStoreError: a store's bytes are not those that were written.
        """
        answers = [self._look_up(sequence, epoch, temperature) for sequence in sequences]
        count = Count()
        lost: dict[int, int] = {}  # document's number -> positions that somebody must answer yet
        for i, (sequence, answer) in enumerate(zip(sequences, answers, strict=True)):
            answered = sequence.answered(0 if answer is None else len(answer))
            reach = self._reach(sequence) if self.asks or self._services else len(sequence.trained)
            hits, misses, unasked = (
                int(sequence.trained[part].sum())
                for part in (slice(answered), slice(answered, None), slice(max(answered, reach), None))
            )
            count += Count(hits, misses, unasked)
            if misses > unasked:
                lost[i] = misses - unasked
        for service in self._services:
            if lost:
                count.by_service += self._ask_service(service, sequences, answers, lost, epoch, temperature)
        if lost and self.on_miss == "error":
            raise MissingTargetsError(
                f"{sequences[next(iter(lost))].where} is not in the store"
                f"{', and its service does not answer it' * bool(self._services)}; "
                "type --teacher T to ask it live, or --on-miss hard-only or skip"
            )
        if lost and self._teacher is not None:
            recipe = self.recipe
            alone = self._writer is None and not self._teachers.stores
            if alone and temperature is not None:  # nobody reads the others
                recipe = replace(recipe, temperatures=(temperature,))
            records = self._teacher.records([self._live_ids(sequences[i]) for i in lost], recipe)
            for i, record in zip(lost, records, strict=True):
                if record is None:
                    count.failed += lost[i]
                    continue
                live, stored = recipe.read(record.records, temperature, epoch), answers[i]
                answers[i] = live if stored is None else stored.followed_by(live)
            if self._writer is not None:
                self._writer.append(
                    [record for record in records if record is not None and record.key not in self._writer]
                )
                if sum(len(record.records) for record in self._writer.pending.values()) >= shard_positions(recipe):
                    self._writer.commit(list(self._writer.pending))
        return [sequence.own(answer) for sequence, answer in zip(sequences, answers, strict=True)], count

    def _ask_service(
        self,
        service: ServedStore,
        sequences: Sequence[TokenSequence],
        answers: list[SparseTargets | None],
        lost: dict[int, int],
        epoch: int,
        temperature: float | None,
    ) -> int:
        """Have a service's teacher answer what is lost, as far as it does; how many positions that were."""
        before = sum(lost.values())
        asked = list(lost)
        for i, record in zip(asked, service.taught([self._live_ids(sequences[i]) for i in asked]), strict=True):
            stored, sequence = answers[i], sequences[i]
            if record is None or len(record.records) <= (0 if stored is None else len(stored)):
                continue
            live = self.recipe.read(record.records, temperature, epoch)
            answers[i] = live if stored is None else stored.followed_by(live)
            rest = slice(sequence.answered(len(live)), self._reach(sequence))
            lost[i] = int(sequence.trained[rest].sum())
            if not lost[i]:
                del lost[i]
        return before - sum(lost.values())

    def close(self) -> None:
        """Make a shard of what was kept."""
        if self._writer is not None and self._writer.pending:
            self._writer.commit(list(self._writer.pending))

    def _answered(self, sequence: TokenSequence) -> int:
        """How many leading positions of the document are answered without the teacher."""
        stores = self._teachers.of(sequence)
        positions = stores.answered(sequence.asked_ids)
        if self._cut(sequence) and positions < len(self._live_ids(sequence)) - 1:
            positions = max(positions, stores.answered(self._live_ids(sequence)))
        if self._writer is not None and document_key(self._live_ids(sequence)) in self._writer:
            positions = max(positions, len(self._live_ids(sequence)) - 1)
        return sequence.answered(positions)

    def _live_ids(self, sequence: TokenSequence) -> npt.NDArray[np.int32]:
        """What of a document the teacher is given."""
        return sequence.asked_ids[: self._most]

    def _cut(self, sequence: TokenSequence) -> bool:
        return self._most is not None and len(sequence.asked_ids) > self._most

    def _reach(self, sequence: TokenSequence) -> int:
        """How many leading positions of the document the teacher would answer."""
        return sequence.answered(len(self._live_ids(sequence)) - 1)

    def _look_up(self, sequence: TokenSequence, epoch: int, temperature: float | None) -> SparseTargets | None:
        """What is known of what the teacher reads, without asking it."""
        stores = self._teachers.of(sequence)
        found = stores.get(sequence.asked_ids, temperature, epoch)
        most = len(self._live_ids(sequence)) - 1
        if self._writer is not None and (found is None or len(found) < most):
            kept = self._writer.pending.get(document_key(self._live_ids(sequence)))
            if kept is not None:
                return self.recipe.read(kept.records, temperature, epoch)
        if self._cut(sequence) and (found is None or len(found) < most):  # a short beginning has a key and no more
            found = stores.get(self._live_ids(sequence), temperature, epoch) or found
        return found
