"""The live teacher as a run asks it: again where it fails, and given up where it stays away.

Stands between a run's misses and the teacher. A teacher that fails while it answers (no memory, a device or a file that
is gone) is asked again, a bounded number of times, waiting twice as long before each. If it still fails it is lost:
under `--on-miss online` that is an error; under "hard-only" and "skip" it is told once, and it is not asked again in
this run. A document on which its logits are no numbers loses that document and not the teacher.
"""

import time
from collections.abc import Callable, Sequence

import distill_kernels  # noqa: F401  loads a fast BLAS before MLX

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from distill_trainer.kinds import OnMiss
from logitstore.errors import ModelError, TeacherLostError, UnusableLogitsError, first_line
from logitstore.recipe import DocumentRecord, Recipe
from logitstore.teacher import Teacher

RETRIES = 4
FIRST_WAIT_S = 0.5
"""Before the first retry; 1, 2 and 4 seconds before the others."""
DONE = {"hard-only": "trained on their labels alone", "skip": "left out"}
"""What becomes of positions without an answer, for the user."""
SILENT = {
    "online": "and where it does not answer the run stops",
    **{policy: f"and positions that it does not answer are {done}" for policy, done in DONE.items()},
}
"""What is done where the teacher does not answer, for the user."""


class LiveTeacher:
    """A teacher that may go away.

    Args:
        on_miss: "online", or what is done where the teacher does not answer.
        say: takes a line of text for the user.
        sleep: waits so many seconds.
    """

    def __init__(
        self,
        teacher: Teacher,
        on_miss: OnMiss,
        say: Callable[[str], object] = lambda _: None,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        self.lost = False
        self._teacher = teacher
        self._on_miss = on_miss
        self._say = say
        self._sleep = sleep
        self._told_of_unusable = False

    def records(self, documents: Sequence[npt.NDArray[np.int32]], recipe: Recipe) -> list[DocumentRecord | None]:
        """What `Teacher.records` says; None of a document that stays without an answer.

        Raises:
            TeacherLostError: under "online", it failed as often as it is asked.
            UnusableLogitsError: under "online", NaN or infinite logits.
        """
        if self.lost:
            return [None] * len(documents)
        try:
            return list(self._asked(documents, recipe))
        except UnusableLogitsError as error:
            if self._on_miss == "online":
                raise UnusableLogitsError(f"{error}; type --on-miss hard-only to go on without its answer") from error
            if len(documents) > 1:  # one spoils the batch of all
                return [self.records([token_ids], recipe)[0] for token_ids in documents]
            if not self._told_of_unusable:
                self._say(f"{error}; positions of such documents are {DONE[self._on_miss]}, and counted")
            self._told_of_unusable = True
        except TeacherLostError as error:
            if self._on_miss == "online":
                raise TeacherLostError(f"{error}; type --on-miss hard-only to go on without its answers") from error
            self.lost = True
            self._say(f"{error}; from here on positions that no store answers are {DONE[self._on_miss]}, and counted")
        return [None] * len(documents)

    def _asked(self, documents: Sequence[npt.NDArray[np.int32]], recipe: Recipe) -> list[DocumentRecord]:
        wait_s = FIRST_WAIT_S
        for left in reversed(range(RETRIES + 1)):
            try:
                return self._teacher.records(documents, recipe)
            except UnusableLogitsError:
                raise
            except (ModelError, OSError, RuntimeError, MemoryError) as error:
                if not left:
                    raise TeacherLostError(
                        f"the teacher answers no more, asked {RETRIES + 1} times: "
                        f"{type(error).__name__}: {first_line(error)}"
                    ) from error
            mx.clear_cache()  # it may have been memory that it lacked
            self._sleep(wait_s)
            wait_s *= 2
        raise AssertionError("the last attempt returns or raises")
