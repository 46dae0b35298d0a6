"""Makes items in a second thread, a few ahead of who takes them. What goes wrong there is raised at its turn."""

from collections.abc import Generator, Iterator
from contextlib import suppress
from queue import Empty, Full, Queue
from threading import Event, Thread
from typing import TypeVar

T = TypeVar("T")
POLL_S = 0.1
JOIN_S = 5.0
"""An item that takes longer, as one that a network is asked for, is left to itself."""


def prefetched(items: Iterator[T], ahead: int) -> Generator[T]:
    """The same items in the same order, at most `ahead` of them made before they are asked for.

    The thread ends with the items, or when the iterator is closed, after the item that it is making then.
    """
    ready: Queue[tuple[bool, T | BaseException | None]] = Queue(ahead)
    closed = Event()

    def put(found: bool, item: T | BaseException | None) -> bool:
        while not closed.is_set():
            with suppress(Full):
                ready.put((found, item), timeout=POLL_S)
                return True
        return False

    def make() -> None:
        try:
            for item in items:
                if not put(True, item):
                    return
            put(False, None)
        except BaseException as error:
            put(False, error)

    thread = Thread(target=make, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            found, item = ready.get()
            if found:
                yield item  # type: ignore[misc]
            elif item is None:
                return
            else:
                raise item  # type: ignore[misc]
    finally:
        closed.set()
        with suppress(Empty):
            while True:
                ready.get_nowait()
        thread.join(JOIN_S)
