"""Where a document's targets come from: the stores in order, then the live teacher, or nobody.

A miss is counted in positions and handled by the run's policy. What the teacher answers goes through the same recipe as
a build, so it is what the store would have said; with a writer it is kept for the next run.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from distill_trainer.config import OnMiss
from logitstore.errors import MissingTargetsError
from logitstore.journal import ShardWriter
from logitstore.key import document_key
from logitstore.plan import SHARD_POSITIONS
from logitstore.recipe import Recipe
from logitstore.sequences import TokenSequence
from logitstore.targets import SparseTargets
from logitstore.teacher import Teacher
from logitstore.zarr_store import ZarrStore


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
        stores: Sequence[ZarrStore],
        recipe: Recipe,
        on_miss: OnMiss,
        teacher: Teacher | None = None,
        writer: ShardWriter | None = None,
    ) -> None:
        self.recipe = recipe
        self.on_miss = on_miss
        self._stores = stores
        self._teacher = teacher
        self._writer = writer

    def missing(self, sequences: Sequence[TokenSequence]) -> int:
        """How many of these documents the stores have no answer for; reads no values."""
        return sum(not self._holds(document_key(sequence.token_ids)) for sequence in sequences)

    def answer(self, sequences: Sequence[TokenSequence]) -> tuple[list[SparseTargets | None], Count]:
        """Targets of each document, or None where it has none by the run's policy.

        Raises:
            MissingTargetsError: a miss under the policy "error".
            CorruptStoreError: a store's bytes are not those that were written.
        """
        answers = [self._look_up(sequence) for sequence in sequences]
        lost = [i for i, answer in enumerate(answers) if answer is None]
        count = Count(
            hits=sum(int(s.trained.sum()) for s, answer in zip(sequences, answers, strict=True) if answer is not None),
            misses=sum(int(sequences[i].trained.sum()) for i in lost),
        )
        if lost and self.on_miss == "error":
            raise MissingTargetsError(
                f"{sequences[lost[0]].where} is not in the store; "
                "type --teacher T to ask it live, or --on-miss hard-only or skip"
            )
        if lost and self.on_miss == "online":
            assert self._teacher is not None
            records = self._teacher.records([sequences[i].token_ids for i in lost], self.recipe)
            for i, record in zip(lost, records, strict=True):
                answers[i] = self.recipe.read(record.records)
            if self._writer is not None:
                self._writer.append([record for record in records if record.key not in self._writer])
                if sum(len(record.records) for record in self._writer.pending.values()) >= SHARD_POSITIONS:
                    self._writer.commit(list(self._writer.pending))
        return answers, count

    def close(self) -> None:
        """Make a shard of what was kept."""
        if self._writer is not None and self._writer.pending:
            self._writer.commit(list(self._writer.pending))

    def _holds(self, key: bytes) -> bool:
        return any(key in store for store in self._stores) or (self._writer is not None and key in self._writer)

    def _look_up(self, sequence: TokenSequence) -> SparseTargets | None:
        for store in self._stores:
            targets = store.get(sequence.token_ids)
            if targets is not None:
                return targets
        if self._writer is not None:
            kept = self._writer.pending.get(document_key(sequence.token_ids))
            if kept is not None:
                return self.recipe.read(kept.records)
        return None
