"""One thread that does jobs in their order while the caller goes on: a build's selection, packing and disk.

Whoever submits waits while there are two jobs that have not been begun, so that memory is bounded; a job that failed is
told at the next call.
"""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from threading import BoundedSemaphore
from types import TracebackType
from typing import Any, TypeVar

T = TypeVar("T")
AHEAD = 3


class Worker:
    """Use it in a `with` block; leaving it, however, waits for what was submitted."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "logitstore")
        self._room = BoundedSemaphore(AHEAD)
        self._submitted: deque[Future[Any]] = deque()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._pool.shutdown()
        if kind is None:
            for future in self._submitted:
                future.result()

    def submit(self, job: Callable[[], T]) -> "Future[T]":
        """Do a job after those before it.

        Raises:
            Exception: whatever an earlier job raised.
        """
        while self._submitted and self._submitted[0].done():
            self._submitted.popleft().result()
        self._room.acquire()

        def run() -> T:
            try:
                return job()
            finally:
                self._room.release()

        future = self._pool.submit(run)
        self._submitted.append(future)
        return future


def at_once(job: Callable[[], T]) -> "Future[T]":
    """Do a job here and now; what it raises is raised here."""
    future: Future[T] = Future()
    future.set_result(job())
    return future
