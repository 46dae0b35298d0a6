"""Where a document's targets come from: the stores in order, then the live teacher, or nobody.

A miss is decided and counted position by position, and handled by the run's policy. What the teacher answers goes
through the same recipe as a build, so it is what the store would have said; with a writer it is kept for the next run.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from distill_trainer.config import OnMiss
from logitstore.contract import Store, Writer
from logitstore.errors import MissingTargetsError
from logitstore.key import document_key
from logitstore.plan import SHARD_POSITIONS
from logitstore.recipe import Recipe
from logitstore.sequences import TokenSequence
from logitstore.stack import Stack
from logitstore.targets import SparseTargets
from logitstore.teacher import Teacher


@dataclass
class Count:
    """Trained positions that the stores answered, and those they did not."""

    hits: int = 0
    misses: int = 0

    def __add__(self, other: "Count") -> "Count":
        return Count(self.hits + other.hits, self.misses + other.misses)


class TargetSource:
    """Answers for documents.

    Args:
        stores: in order of lookup; all with this recipe.
        teacher: asked on a miss when the policy is "online".
        writer: keeps the teacher's answers.
    """

    def __init__(
        self,
        stores: Sequence[Store],
        recipe: Recipe,
        on_miss: OnMiss,
        teacher: Teacher | None = None,
        writer: Writer | None = None,
    ) -> None:
        self.recipe = recipe
        self.on_miss = on_miss
        self._stack = Stack(stores)
        self._teacher = teacher
        self._writer = writer

    def missing(self, sequences: Sequence[TokenSequence]) -> int:
        """How many of these documents have a trained position that the stores do not answer; reads no values."""
        return sum(bool(s.trained[self._answered(s) :].any()) for s in sequences)

    def answer(
        self, sequences: Sequence[TokenSequence], epoch: int = 0, temperature: float | None = None
    ) -> tuple[list[SparseTargets | None], Count]:
        """Targets of each document by the run's policy: of all of its positions, of the first ones, or None.

        Args:
            epoch: which of several stored draws is read.
            temperature: which of the recipe's; by default the first.

        Raises:
            MissingTargetsError: a miss under the policy "error".
            CorruptStoreError: a store's bytes are not those that were written.
        """
        answers = [self._look_up(sequence, epoch, temperature) for sequence in sequences]
        count, lost = Count(), []
        for i, (sequence, answer) in enumerate(zip(sequences, answers, strict=True)):
            answered = 0 if answer is None else len(answer)
            count += Count(int(sequence.trained[:answered].sum()), int(sequence.trained[answered:].sum()))
            if sequence.trained[answered:].any():
                lost.append(i)
        if lost and self.on_miss == "error":
            raise MissingTargetsError(
                f"{sequences[lost[0]].where} is not in the store; "
                "type --teacher T to ask it live, or --on-miss hard-only or skip"
            )
        if lost and self.on_miss == "online":
            assert self._teacher is not None
            recipe = self.recipe
            if self._writer is None and not self._stack.stores and temperature is not None:  # nobody reads the others
                recipe = replace(recipe, temperatures=(temperature,))
            records = self._teacher.records([sequences[i].token_ids for i in lost], recipe)
            for i, record in zip(lost, records, strict=True):
                live, stored = recipe.read(record.records, temperature, epoch), answers[i]
                answers[i] = live if stored is None else stored.followed_by(live)
            if self._writer is not None:
                self._writer.append([record for record in records if record.key not in self._writer])
                if sum(len(record.records) for record in self._writer.pending.values()) >= SHARD_POSITIONS:
                    self._writer.commit(list(self._writer.pending))
        return answers, count

    def close(self) -> None:
        """Make a shard of what was kept."""
        if self._writer is not None and self._writer.pending:
            self._writer.commit(list(self._writer.pending))

    def _answered(self, sequence: TokenSequence) -> int:
        if self._writer is not None and document_key(sequence.token_ids) in self._writer:
            return len(sequence.trained)
        return self._stack.answered(sequence.token_ids)

    def _look_up(self, sequence: TokenSequence, epoch: int, temperature: float | None) -> SparseTargets | None:
        if self._writer is not None:
            kept = self._writer.pending.get(document_key(sequence.token_ids))
            if kept is not None:
                return self.recipe.read(kept.records, temperature, epoch)
        return self._stack.get(sequence.token_ids, temperature, epoch)
