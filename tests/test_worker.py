import threading
import time

import pytest

from logitstore.worker import AHEAD, Worker, at_once


def test_jobs_are_done_in_their_order_in_another_thread() -> None:
    done: list[tuple[int, str]] = []
    with Worker() as worker:
        for i in range(20):
            worker.submit(lambda i=i: done.append((i, threading.current_thread().name)))
    assert [i for i, _ in done] == list(range(20)) and threading.current_thread().name not in {n for _, n in done}


def test_who_submits_waits_while_there_is_no_room() -> None:
    gate, submitted = threading.Event(), []

    def submit(worker: Worker) -> None:
        for i in range(AHEAD + 2):
            worker.submit(gate.wait)
            submitted.append(i)

    with Worker() as worker:
        thread = threading.Thread(target=submit, args=(worker,))
        thread.start()
        time.sleep(0.2)
        assert len(submitted) == AHEAD
        gate.set()
        thread.join()


def test_a_job_that_failed_is_told_at_the_next_call_or_at_the_end() -> None:
    def fail() -> None:
        raise OSError("full")

    with pytest.raises(OSError, match="full"), Worker() as worker:
        worker.submit(fail)
    with pytest.raises(OSError, match="full"), Worker() as worker:
        failed = worker.submit(fail)
        assert isinstance(failed.exception(), OSError)
        worker.submit(lambda: pytest.fail("a job after a failed one was submitted"))


def test_what_was_submitted_is_done_even_where_the_caller_stops() -> None:
    done: list[int] = []
    with pytest.raises(KeyboardInterrupt), Worker() as worker:
        for i in range(AHEAD):
            worker.submit(lambda i=i: (time.sleep(0.02), done.append(i)))
        raise KeyboardInterrupt
    assert done == list(range(AHEAD))


def test_at_once_is_done_here_and_raises_here() -> None:
    assert at_once(threading.current_thread).result() is threading.current_thread()
    with pytest.raises(ZeroDivisionError):
        at_once(lambda: 1 // 0)
