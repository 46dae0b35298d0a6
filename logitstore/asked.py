"""What a teacher reads in place of a document, where it is asked in other words than the student.

The two differ in the prompt and have the same completion, token for token. Position i of the completion is another
position of the document for each of them; this is where one becomes the other. A difference is refused, never shifted.
"""

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from logitstore.errors import DatasetError
from logitstore.targets import SparseTargets


@dataclass(frozen=True, eq=False)
class Asked:
    """The teacher's M tokens for a document that the student reads as L tokens."""

    token_ids: npt.NDArray[np.int32]
    """[M]; its key in a store is theirs."""
    positions: npt.NDArray[np.int32]
    """[L - 1], never falling: the teacher's position that predicts the same token as the student's. Where the student's
    is not trained, the one before it; nobody reads that."""
    taught: npt.NDArray[np.bool_] | None = None
    """[L - 1]; at which positions its answer says something, where it answers. None: all."""
    spans: npt.NDArray[np.int32] | None = None
    """[L - 1]; where positions are taught together, the last one of those that each belongs to, -1 for none."""

    def answered(self, positions: int) -> int:
        """How many of the student's positions the teacher's first ones answer."""
        return int(np.searchsorted(self.positions, positions))

    def shifted(self, targets: SparseTargets) -> SparseTargets:
        """The teacher's answer at the student's positions, as far as it goes."""
        rows = self.positions[: self.answered(len(targets))]
        return replace(targets.rows(rows), positions=np.arange(len(rows), dtype=np.int32))


def align(
    token_ids: npt.NDArray[np.int32],
    trained: npt.NDArray[np.bool_],
    teacher_ids: npt.NDArray[np.int32],
    teacher_trained: npt.NDArray[np.bool_],
    where: str,
    *,
    cut_at: int | None,
) -> Asked:
    """Find the trained tokens of the student's document in the teacher's.

    Args:
        token_ids, trained: the student's, int32 [L] and bool [L - 1].
        teacher_ids, teacher_trained: the teacher's, of the whole document.
        cut_at: the length that the student's was cut at; None where it is whole. The teacher's is cut there too, or
            where the student's ends if that is later.

    Raises:
        DatasetError: they are other tokens there.
    """
    own, other = np.flatnonzero(trained), np.flatnonzero(teacher_trained)
    fits = len(own) == len(other) if cut_at is None else len(own) <= len(other)
    other = other[: len(own)]
    if not fits or not np.array_equal(token_ids[own + 1], teacher_ids[other + 1]):
        raise DatasetError(
            f"{where}: after the teacher's prompt the completion is other tokens than after the student's, expected "
            "the same; type --teacher-prompt-template and --student-prompt-template that end alike"
        )
    positions = np.zeros(len(trained), np.int32)
    positions[own] = other
    positions = np.maximum.accumulate(positions)
    return Asked(teacher_ids if cut_at is None else teacher_ids[: max(int(other[-1]) + 2, cut_at)], positions)
