import threading
import time
from collections.abc import Iterator

import pytest

from logitstore.prefetch import prefetched


def test_items_come_in_their_order_and_then_end() -> None:
    assert list(prefetched(iter(range(100)), 3)) == list(range(100))
    assert list(prefetched(iter(()), 3)) == []


def test_no_more_are_made_ahead_than_asked_for() -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for i in range(50):
            made.append(i)
            yield i

    ahead = prefetched(items(), 2)
    assert next(ahead) == 0
    time.sleep(0.2)
    assert len(made) <= 1 + 2 + 1  # taken, waiting, and the one in hand
    ahead.close()


def test_an_error_is_raised_at_its_turn_and_not_before() -> None:
    def items() -> Iterator[int]:
        yield 1
        yield 2
        raise KeyError("third")

    ahead = prefetched(items(), 5)
    assert (next(ahead), next(ahead)) == (1, 2)
    with pytest.raises(KeyError, match="third"):
        next(ahead)


def test_the_thread_ends_when_the_iterator_is_closed() -> None:
    before = threading.active_count()
    ahead = prefetched(iter(range(1000)), 2)
    next(ahead)
    assert threading.active_count() == before + 1
    ahead.close()
    assert threading.active_count() == before
