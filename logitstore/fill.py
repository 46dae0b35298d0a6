"""The loop of a build and of a repair: windows of documents in, the teacher's answers in shards out."""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from logitstore.contract import Writer
from logitstore.plan import plan_batches
from logitstore.recipe import DocumentRecord, Recipe
from logitstore.sequences import TokenSequence
from logitstore.worker import Worker


class Answering(Protocol):
    """What a teacher does here; see `teacher.Teacher.submit`."""

    def submit(
        self,
        documents: Sequence[npt.NDArray[np.int32]],
        recipe: Recipe,
        submit: "Callable[[Callable[[], Any]], Future[Any]]",
    ) -> list[Callable[[], DocumentRecord]]: ...


def fill(
    windows: Iterable[dict[bytes, TokenSequence]],
    teacher: Answering,
    recipe: Recipe,
    writer: Writer,
    batch_tokens: int,
    update: Callable[[int], object],
) -> None:
    """Run the teacher over windows, each of which becomes a shard; a second thread selects, packs and writes meanwhile.

    Args:
        update: is told how many positions each batch had.
    """
    with Worker() as worker:
        for window in windows:
            rest = {key: sequence for key, sequence in window.items() if key not in writer.pending}
            for batch in plan_batches(rest, batch_tokens):
                answers = teacher.submit([rest[key].token_ids for key in batch], recipe, worker.submit)
                worker.submit(partial(_append, writer, answers))
                update(sum(len(rest[key].trained) for key in batch))
            worker.submit(partial(writer.commit, list(window)))


def _append(writer: Writer, answers: Sequence[Callable[[], DocumentRecord]]) -> None:
    writer.append([answer() for answer in answers])
