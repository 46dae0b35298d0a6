"""The teacher's desk: each document once, a failure fails alone, what was told is kept, nobody waits for ever."""

import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from logitstore import files
from logitstore.errors import UnusableLogitsError
from logitstore.journal import ShardWriter
from logitstore.key import document_key
from logitstore.recipe import DocumentRecord
from logitstore.service import desk as module
from logitstore.service.desk import CannotKeepError, CannotTeachError, Desk, QueueFullError
from logitstore.service.serve import take_over
from logitstore.service.shelf import Served, Shelf
from logitstore.store import open_store
from logitstore.verify import verify
from logitstore.zarr_store import ZarrStore
from tests.children import forked
from tests.guessing import Guessing, asked, at_once, bytes_of, handles, until
from tests.stores import VOCABULARY, manifest, small_store, tokens
from tests.stubs import answer, flip

RECIPE = manifest().recipe


@pytest.fixture
def served(tmp_path: Path) -> Served:
    small_store(tmp_path / "s.zarr")
    return Shelf([tmp_path]).get("s")


@contextmanager
def working(teacher: Callable[[], Any], most_tokens: int = 1 << 18) -> Iterator[Desk]:
    said: list[str] = []
    desk = Desk(teacher, most_tokens, said.append)
    desk.said = said  # type: ignore[attr-defined]
    desk.start()
    try:
        yield desk
    finally:
        getattr(teacher, "goes_on", threading.Event()).set()
        desk.stop()


def of(futures: "list[Future[DocumentRecord]]") -> list[Any]:
    """What each gives, or raises."""
    return [future.exception(20) or future.result() for future in futures]


def documents(count: int, first: int = 5000, length: int = 12) -> list[Any]:
    return [tokens(first + i, length) for i in range(count)]


def keys(store: ZarrStore) -> list[bytes]:
    """Of all documents in all shards, those that are there twice twice."""
    return [bytes(key) for name in store.shard_names for key in store.shard(name).keys]


def test_what_was_taught_is_in_shards_once_the_desk_has_stopped(served: Served) -> None:
    teacher, some = Guessing(), documents(20)
    with working(teacher) as desk:
        found = of(asked(desk, served, some))
    store = open_store(served.path)
    for document, record in zip(some, found, strict=True):
        assert bytes_of(store.answer(document)) == bytes_of(record) == bytes_of(answer(document, RECIPE))
    assert sorted(teacher.computed) == sorted(map(document_key, some))
    assert not list(served.path.glob(".journal-*"))


def test_whoever_asks_for_what_is_asked_for_waits_for_the_same_answer(served: Served) -> None:
    teacher, (one, two, three) = Guessing(), documents(3)
    teacher.goes_on.clear()
    with working(teacher) as desk:
        first = asked(desk, served, [one])
        assert teacher.begun.wait(20)
        again = asked(desk, served, [three, one, two, two])  # one is being computed
        assert again[1] is first[0] and again[2] is again[3]
        assert desk.waiting == (3, 36)
        teacher.goes_on.set()
        of(first + again)
        assert len(teacher.computed) == 3 and desk.waiting == (0, 0)


@pytest.mark.parametrize(
    "fault", [RuntimeError("[metal] out of memory\nmore"), MemoryError(), UnusableLogitsError("NaN"), KeyError("x")]
)
def test_a_document_that_the_teacher_fails_on_fails_alone(served: Served, fault: Exception) -> None:
    teacher, some = Guessing(), documents(9)
    teacher.faults[document_key(some[4])] = fault
    with working(teacher) as desk:
        found = of(asked(desk, served, some))
        assert isinstance(found[4], CannotTeachError) and type(fault).__name__ in str(found[4])
        assert "more" not in str(found[4])
        assert [isinstance(f, DocumentRecord) for f in found].count(True) == 8
        assert (desk.taught, desk.failed, desk.waiting) == (8, 1, (0, 0))
        teacher.faults.clear()
        assert isinstance(of(asked(desk, served, [some[4]]))[0], DocumentRecord)  # it may be otherwise later


def test_a_full_disk_fails_what_is_asked_and_keeps_what_was_told(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, (one, two) = module.ShardWriter.append, documents(2)

    def full(self: ShardWriter, some: Any) -> None:
        monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        try:
            write(self, some)
        finally:
            monkeypatch.undo()

    with working(Guessing()) as desk:
        assert isinstance(of(asked(desk, served, [one]))[0], DocumentRecord)
        monkeypatch.setattr(module.ShardWriter, "append", full)
        (error,) = of(asked(desk, served, [two]))
        assert isinstance(error, CannotKeepError) and "No space left" in str(error)
        (record,) = of(asked(desk, served, [two]))
        assert bytes_of(record) == bytes_of(answer(two, RECIPE))
    assert all(open_store(served.path).answer(d) is not None for d in (one, two))


def test_a_full_queue_refuses_and_says_when_to_come_again(served: Served) -> None:
    teacher = Guessing()
    teacher.goes_on.clear()
    with working(teacher, most_tokens=30) as desk:
        first = asked(desk, served, documents(40))  # more than the queue, and nothing waits
        with pytest.raises(QueueFullError) as error:
            asked(desk, served, documents(1, 6000))
        assert error.value.wait_s >= 1 and "480 tokens wait" in str(error.value)
        assert asked(desk, served, documents(40)) == first  # whoever waits for the same adds nothing
        teacher.goes_on.set()
        of(first)
        assert isinstance(of(asked(desk, served, documents(1, 6000)))[0], DocumentRecord)


def test_a_teacher_that_does_not_load_refuses_all_who_wait_and_all_who_come(served: Served) -> None:
    gate = threading.Event()

    def load() -> Guessing:
        assert gate.wait(20)
        raise OSError(2, "no such file", "/somewhere")

    with working(load) as desk:
        assert desk.state == "loading" and desk.teaches(served)
        waiting = asked(desk, served, documents(3))
        gate.set()
        assert all(isinstance(error, CannotTeachError) and "does not load" in str(error) for error in of(waiting))
        assert desk.state == "lost" and desk.waiting == (0, 0)
        with pytest.raises(CannotTeachError, match="lost"):
            asked(desk, served, documents(1))


def test_stopping_while_documents_wait_tells_them_to_come_again(served: Served) -> None:
    teacher, some = Guessing(), documents(3, length=1500)  # a batch each
    teacher.goes_on.clear()
    with working(teacher) as desk:
        waiting = asked(desk, served, some)
        assert teacher.begun.wait(20)
        stops = threading.Thread(target=desk.stop)
        stops.start()
        until(lambda: desk._stopping)
        with pytest.raises(CannotTeachError, match="being stopped"):
            asked(desk, served, documents(1))
        teacher.goes_on.set()
        stops.join(20)
        found = of(waiting)
    assert isinstance(found[0], DocumentRecord) and all(isinstance(error, CannotKeepError) for error in found[1:])
    assert open_store(served.path).answer(some[0]) is not None


def test_stopping_does_not_wait_for_a_teacher_that_loads(served: Served) -> None:
    gate = threading.Event()

    def load() -> Guessing:
        assert gate.wait(20)
        return Guessing()

    desk = Desk(load, 1 << 18)
    desk.start()
    waiting = asked(desk, served, documents(2))
    desk.stop()
    assert all(isinstance(error, CannotKeepError) for error in of(waiting)) and desk.state == "lost"
    gate.set()
    desk._thread.join(20)
    assert desk.state == "lost"


def test_a_fault_of_our_own_refuses_who_waits_and_the_next_is_answered(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = documents(2)
    with working(Guessing()) as desk:
        monkeypatch.setattr(Guessing, "manifest", lambda *_: 1 / 0)
        (error,) = of(asked(desk, served, [one]))
        assert isinstance(error, CannotKeepError) and "ZeroDivisionError" in str(error)
        monkeypatch.undo()
        assert isinstance(of(asked(desk, served, [two]))[0], DocumentRecord)


def test_another_teacher_than_the_stores_own_teaches_nothing(served: Served) -> None:
    teacher = Guessing(weights_digest="b" * 32)
    with working(teacher) as desk:
        (error,) = of(asked(desk, served, documents(1)))
        assert isinstance(error, CannotTeachError) and "does not teach s" in str(error)
        assert not desk.teaches(served) and not teacher.computed


def test_a_store_that_the_teacher_can_never_have_built_keeps_it_from_no_other(served: Served, tmp_path: Path) -> None:
    ZarrStore.create(tmp_path / "wide.zarr", manifest("top-k:200"), VOCABULARY)
    stores, narrow = [served, Shelf([tmp_path]).get("wide")], Guessing()
    narrow.vocab_size = 100
    desk = Desk(narrow, 1 << 18, stores=lambda: stores)
    desk.start()
    until(lambda: desk.state != "loading")
    assert desk.state == "ready" and not desk.teaches(stores[1]) and "top-k:200" in desk.refusal(stores[1])
    desk.stop()


def test_two_services_on_one_store_end_with_every_document_once(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = ZarrStore.write_documents
    monkeypatch.setattr(ZarrStore, "write_documents", lambda *args: time.sleep(0.3) or write(*args))
    some, other = documents(60), Shelf([served.path]).get("s")
    with working(Guessing()) as one, working(Guessing()) as two:
        found = at_once(2, lambda n: of(asked((one, two)[n], (served, other)[n], some[:: 1 - 2 * n])))
        at_once(2, lambda n: (one, two)[n].stop())
    assert all(isinstance(record, DocumentRecord) for records in found for record in records)
    store = open_store(served.path)
    assert isinstance(store, ZarrStore)
    assert len(keys(store)) == len(set(keys(store))) == len(store) == 60 + 6
    assert not list(served.path.glob(".journal-*"))


def test_a_journal_that_a_killed_service_left_is_taken_over_at_start(served: Served) -> None:
    some = documents(3)
    writer = ShardWriter(ZarrStore(served.files, served.path), "service-0")
    writer.append([answer(document, RECIPE) for document in some])
    writer._file.close()  # the kernel's part of a kill
    take_over(Shelf([served.path]))
    assert all(open_store(served.path).answer(document) is not None for document in some)
    assert not list(served.path.glob(".journal-*"))


def test_a_journal_that_was_left_after_the_start_is_not_computed_again(served: Served) -> None:
    teacher, some = Guessing(), documents(4)
    with ShardWriter(ZarrStore(served.files, served.path), "service-0") as writer:
        writer.append([answer(document, RECIPE) for document in some[:2]])
    with working(teacher) as desk:
        of(asked(desk, served, some))
    assert sorted(teacher.computed) == sorted(map(document_key, some[2:]))


def test_answers_of_a_deleted_store_are_not_told_as_kept(served: Served) -> None:
    teacher = Guessing()
    with working(teacher) as desk:
        of(asked(desk, served, documents(1)))
        teacher.begun.clear()
        teacher.goes_on.clear()
        waiting = asked(desk, served, documents(1, 6000))
        assert teacher.begun.wait(20)
        shutil.rmtree(served.path)
        teacher.goes_on.set()
        (error,) = of(waiting)
        assert isinstance(error, CannotKeepError) and "is gone" in str(error)
        with pytest.raises(CannotTeachError, match="is gone"):
            asked(desk, served, documents(1, 6000))
    assert not served.path.exists()


def test_answers_about_a_store_that_was_replaced_never_reach_the_one_in_its_place(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    with working(Guessing()) as desk:
        of(asked(desk, served, documents(5)))
        shutil.rmtree(served.path)
        ZarrStore.create(served.path, manifest("top-k:4"), VOCABULARY)
        other = Served("s", served.path)
        assert isinstance(of(asked(desk, other, documents(2, 7000)))[0], DocumentRecord)
        monkeypatch.setattr(module, "IDLE_S", 0.05)
        (error,) = of(asked(desk, served, documents(1, 6000)))
        assert isinstance(error, CannotKeepError)
        until(lambda: served not in desk._keeping._writers)
    store = open_store(served.path)
    assert len(store) == 2 and store.manifest == manifest("top-k:4")


def test_the_same_document_of_a_store_and_of_the_one_in_its_place_are_two(served: Served) -> None:
    teacher, other = Guessing(), Served("s", served.path)
    teacher.goes_on.clear()
    with working(teacher) as desk:
        blocked = asked(desk, served, documents(1, 9000, 2040))
        assert teacher.begun.wait(20)
        found = asked(desk, served, documents(1)) + asked(desk, other, documents(1))
        assert desk.waiting == (3, 2064)
        teacher.goes_on.set()
        assert all(isinstance(record, DocumentRecord) for record in of(blocked + found))
        assert desk.waiting == (0, 0)


def test_the_index_knows_what_was_taught_and_files_of_it_are_let_go(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "IDLE_S", 0.02)
    monkeypatch.setattr(files, "OPEN_FILES", 8)
    with working(Guessing()) as desk:
        for number in range(12):
            (future,) = asked(desk, served, documents(1, 6000 + number))
            of([future])
            until(lambda: not desk.kept(served, document_key(documents(1, 6000 + number)[0])))  # noqa: B023
            if number == 3:
                before = handles()
        assert handles() <= before + 20
    store = open_store(served.path)
    assert isinstance(store, ZarrStore) and store.catalog.index is not None
    assert len(store.catalog.index.shards) == 12 + 2


def test_what_was_told_is_there_after_a_kill_at_any_moment(tmp_path: Path) -> None:
    for trial in range(6):
        path = tmp_path / f"{trial}.zarr"
        small_store(path)
        told, told_w = os.pipe()

        def act(path: Path = path, out: int = told_w) -> None:
            module.IDLE_S = 0.001
            served, teacher = Shelf([path]).get(path.stem), Guessing()
            desk = Desk(teacher, 1 << 18)
            desk.start()
            for number in range(10_000):
                (future,) = asked(desk, served, documents(1, 6000 + number))
                future.result(20)
                os.write(out, number.to_bytes(4, "little"))
                if number % 3 == 0:
                    time.sleep(0.002)

        child = forked(act)
        time.sleep(0.2 + 0.07 * trial)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(told_w)
        with os.fdopen(told, "rb") as file:
            count = len(file.read()) // 4
        take_over(Shelf([path]))
        store = open_store(path)
        assert all(store.answer(documents(1, 6000 + n)[0]) is not None for n in range(count))
        assert np.array_equal(sorted(keys(store)), sorted(set(keys(store))))  # type: ignore[arg-type]


def test_one_long_document_does_not_let_others_be_computed_twice_or_starve(served: Served) -> None:
    teacher = Guessing()
    with working(teacher) as desk:
        found = of(asked(desk, served, documents(1, 9000, 5000) + documents(30) + documents(1, 9500, 2)))
    assert all(isinstance(record, DocumentRecord) for record in found) and len(teacher.computed) == 32


def test_a_damaged_shard_beside_it_does_not_keep_a_batch_from_being_answered(served: Served) -> None:
    known = tokens(0, 7)
    shard = served.store.catalog.locate(known)[0]  # type: ignore[index]
    flip(served.path / shard.where / "entries-0" / "c" / "0" / "0")
    with working(Guessing()) as desk:
        found = of(asked(desk, served, [known, *documents(2)]))
    assert [isinstance(record, DocumentRecord) for record in found] == [False, True, True]


def test_the_index_is_not_written_again_for_every_shard(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "IDLE_S", 0.01)
    written: list[int] = []
    save = ZarrStore.save_index
    monkeypatch.setattr(ZarrStore, "save_index", lambda store: written.append(store.shard_count) or save(store))
    with working(Guessing()) as desk:
        for number in range(40):
            of(asked(desk, served, documents(1, 6000 + number)))
            until(lambda: not desk._keeping._writers[served].pending)
    store = open_store(served.path)
    assert isinstance(store, ZarrStore) and store.catalog.index is not None
    assert len(store.catalog.index.shards) == 42 and len(written) < 33


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 700 KB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=700k", "none", place], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("no file system may be mounted here")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def test_a_disk_that_is_really_full_loses_nothing_that_was_told(small_disk: Path, monkeypatch: Any) -> None:
    small_store(small_disk / "s.zarr")
    ballast = small_disk / "ballast"
    served, told, refused = Shelf([small_disk]).get("s"), list[Any](), list[Any]()
    monkeypatch.setattr(module, "IDLE_S", 0.05)
    with working(Guessing()) as desk:
        for number in range(200):
            (document,) = documents(1, 6000 + number, 200)
            (found,) = of(asked(desk, served, [document]))
            (told if isinstance(found, DocumentRecord) else refused).append(document)
            if number == 3:
                ballast.write_bytes(bytes(200 << 10))
            if len(refused) == 5:
                break
        assert len(told) > 4 and len(refused) == 5
        assert all(isinstance(f, CannotKeepError) for f in of(asked(desk, served, refused)))
        ballast.unlink()
        assert isinstance(of(asked(desk, served, refused[:1]))[0], DocumentRecord)
    store = open_store(served.path)
    assert all(store.answer(document) is not None for document in [*told, refused[0]])
    assert not verify(served.path, quiet=True).problems


def test_a_fault_while_a_shard_is_made_ends_no_teacher_and_loses_nothing(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "IDLE_S", 0.01)
    with working(Guessing()) as desk:
        with monkeypatch.context() as broken:
            broken.setattr(ShardWriter, "commit", lambda *_: [][0])
            of(asked(desk, served, documents(2)))
            until(lambda: "s: list index out of range" in desk.said)  # type: ignore[attr-defined]
        assert len(of(asked(desk, served, documents(3)))) == 3
    assert len(open_store(served.path)) == len(small_store(served.path.with_name("t.zarr"))) + 3
