"""Ctrl-C and SIGTERM between two steps, never within one: what is saved then is the whole of a step."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uninterrupted(*, last: bool = False) -> Iterator[None]:
    """Put off what would raise KeyboardInterrupt in this block to its end; in the main thread, where alone it would.

    Args:
        last: what is asked for happens anyway after this block, so nothing is raised.
    """
    asked: list[int] = []
    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) is signal.default_int_handler:
                before[number] = signal.signal(number, lambda number, _: asked.append(number))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if asked and not last:
        raise KeyboardInterrupt
