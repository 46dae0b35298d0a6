"""The stores that a service has: found anew, replaced, removed, damaged; one thread at a time reads one."""

import shutil
import threading
import time
from pathlib import Path

import pytest

from logitstore.errors import ConfigError, CorruptStoreError, StoreError
from logitstore.journal import ShardWriter
from logitstore.service import shelf as module
from logitstore.service.shelf import Served, Shelf, UnknownStoreError
from logitstore.zarr_store import ZarrStore
from logitstore.zip_store import write_zip
from tests.guessing import at_once, handles
from tests.stores import manifest, small_store, tokens
from tests.stubs import answer, flip


def test_a_folder_is_looked_at_again_whenever_it_is_listed(tmp_path: Path) -> None:
    small_store(tmp_path / "a.zarr")
    shelf = Shelf([tmp_path])
    assert shelf.names() == ["a"]
    small_store(tmp_path / "b")
    (tmp_path / "c").mkdir()
    (tmp_path / ".d.zarr").mkdir()
    assert shelf.names() == ["a", "b"] and len(shelf.get("b").store) == 6
    shutil.rmtree(tmp_path / "a.zarr")
    assert shelf.names() == ["b"]
    with pytest.raises(UnknownStoreError, match="no store 'a'"):
        shelf.get("a")


@pytest.mark.parametrize("name", ["", "..", ".", "a/b", "a.zarr", "A", "a\0", "\ud800", "a" * 5000])
def test_a_name_that_is_none_is_unknown(tmp_path: Path, name: str) -> None:
    small_store(tmp_path / "a.zarr")
    with pytest.raises(UnknownStoreError):
        Shelf([tmp_path]).get(name)


def test_a_store_in_the_place_of_another_is_opened_anew_and_the_same_one_stays_open(tmp_path: Path) -> None:
    small_store(tmp_path / "a.zarr")
    shelf = Shelf([tmp_path])
    first = shelf.get("a")
    assert shelf.get("a") is first and first.is_there()
    shutil.rmtree(tmp_path / "a.zarr")
    small_store(tmp_path / "a.zarr", shards=1)
    second = shelf.get("a")
    assert second is not first and len(second.store) == 3 and not first.is_there()


def test_two_who_open_a_store_at_once_have_the_same_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_store(tmp_path / "a.zarr")
    shelf, opened, found = Shelf([tmp_path]), threading.Event(), list[Served]()
    lock, second = shelf._lock, threading.Thread(target=lambda: found.append(shelf.get("a")))

    class Late:
        """Whoever has opened the store gets this late, when another has come."""

        def __enter__(self) -> None:
            if opened.is_set() and not second.ident:
                second.start()
                second.join(0.5)
            lock.acquire()

        def __exit__(self, *_error: object) -> None:
            lock.release()

    class Told(Served):
        def __init__(self, name: str, path: Path) -> None:
            super().__init__(name, path)
            opened.set()

    monkeypatch.setattr(module, "Served", Told)
    shelf._lock = Late()  # type: ignore[assignment]
    first = shelf.get("a")
    second.join(20)
    assert found == [first]


def test_what_is_served_under_a_name_is_what_an_upload_of_that_name_begins(tmp_path: Path) -> None:
    for name in ("x", "x.zip", "x.zarr"):
        small_store(tmp_path / f"{name}.zarr")
    assert Shelf([tmp_path]).names() == ["x", "x.zarr", "x.zip"]


def test_a_zip_file_that_is_replaced_is_opened_anew(tmp_path: Path) -> None:
    for shards in (2, 1):
        small_store(tmp_path / f"{shards}", shards=shards)
    write_zip(tmp_path / "2", tmp_path / "z.zip")
    shelf = Shelf([tmp_path / "z.zip"])
    assert len(shelf.get("z").store) == 6 and not shelf.get("z").writable
    write_zip(tmp_path / "1", tmp_path / "y.zip")
    (tmp_path / "y.zip").replace(tmp_path / "z.zip")
    assert len(shelf.get("z").store) == 3


def test_what_cannot_be_served_is_said_at_the_start(tmp_path: Path) -> None:
    small_store(tmp_path / "one" / "a.zarr")
    small_store(tmp_path / "two" / "a")
    small_store(tmp_path / "metrics.zarr")
    small_store(tmp_path / "ä.zarr")
    (tmp_path / "x.lmdb").write_bytes(b"")
    for places, word in (
        ([tmp_path / "one", tmp_path / "two"], "both be served as /a"),
        ([tmp_path / "metrics.zarr"], "rename it"),
        ([tmp_path / "ä.zarr"], "rename it"),
        ([tmp_path / "x.lmdb"], "LMDB"),
    ):
        with pytest.raises(ConfigError, match=word):
            Shelf(places)
    for place in (tmp_path / "none", tmp_path / "none.zarr"):
        with pytest.raises((ConfigError, StoreError)):
            Shelf([place]).get(place.stem)


def test_a_store_with_a_name_that_no_url_has_comes_later_and_is_passed_over(tmp_path: Path) -> None:
    small_store(tmp_path / "a.zarr")
    shelf = Shelf([tmp_path])
    for name in ("metrics", "v1.zarr", "a", "ö", "-x", "x y"):
        small_store(tmp_path / name)
    assert shelf.names() == ["a"]


def test_what_others_finish_is_seen_when_it_must_be_and_else_after_a_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LOOKED_S", 60)
    served = Served("a", small_store(tmp_path / "a.zarr").folder)
    with ShardWriter(ZarrStore(served.files, served.path), "x") as writer:
        writer.append([answer(tokens(50, 9), manifest().recipe)])
        writer.commit(list(writer.pending))
    with served.reading() as store:
        assert store.answer(tokens(50, 9)) is None
    with served.reading(fresh=True) as store:
        assert store.answer(tokens(50, 9)) is not None
    monkeypatch.setattr(module, "LOOKED_S", 0)
    with served.reading() as store:
        assert len(store) == 7


def test_one_thread_at_a_time_reads_a_store(tmp_path: Path) -> None:
    served, inside, most = Served("a", small_store(tmp_path / "a.zarr").folder), [0], [0]

    def read(_: int) -> None:
        for _ in range(5):
            with served.reading():
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                time.sleep(0.001)
                inside[0] -= 1

    at_once(8, read)
    assert most == [1]


def test_facts_are_read_once_for_all_who_ask_and_hold_nobody_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served, counted = Served("a", small_store(tmp_path / "a.zarr").folder), list[int]()
    begun, goes_on, info = threading.Event(), threading.Event(), module.info

    def slow(store: ZarrStore) -> dict[str, object]:
        counted.append(1)
        begun.set()
        assert goes_on.wait(20)
        return info(store)

    monkeypatch.setattr(module, "info", slow)
    asks = [threading.Thread(target=served.facts) for _ in range(3)]
    for thread in asks:
        thread.start()
    assert begun.wait(20)
    with served.reading() as store:  # meanwhile
        assert store.answer(tokens(0, 7)) is not None
    goes_on.set()
    for thread in asks:
        thread.join(20)
    assert served.facts()["documents"] == 6 and len(counted) == 1
    monkeypatch.setattr(module, "FACTS_S", 0)
    monkeypatch.setattr(module, "FACTS_SHARE", 0)
    served.reopen()
    assert [served.facts()["documents"] for _ in range(2)] == [6, 6] and len(counted) == 3


def test_a_damaged_root_is_an_error_of_that_store_alone(tmp_path: Path) -> None:
    for name in ("a", "b"):
        small_store(tmp_path / f"{name}.zarr")
    shelf = Shelf([tmp_path])
    flip(tmp_path / "a.zarr" / "zarr.json")
    with pytest.raises(CorruptStoreError):
        shelf.get("a")
    assert len(shelf.get("b").store) == 6


def test_stores_that_come_and_go_leave_nothing_open(tmp_path: Path) -> None:
    shelf = Shelf([tmp_path])
    for number in range(12):
        path = tmp_path / f"{number}.zarr"
        small_store(path, shards=1)
        with shelf.get(str(number)).reading() as store:
            assert store.answer(tokens(0, 7)) is not None
        shutil.rmtree(path)
        if number == 1:
            shelf.names()
            before = handles()
    shelf.names()
    assert handles() <= before + 2 and len(shelf._open) <= 1


def test_a_store_that_takes_long_to_open_keeps_nobody_from_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        small_store(tmp_path / f"{name}.zarr")
    shelf, begun, goes_on = Shelf([tmp_path]), threading.Event(), threading.Event()
    reopen, opened = Served.reopen, list[str]()

    def slow(served: Served) -> None:
        opened.append(served.name)
        if served.name == "a":
            begun.set()
            assert goes_on.wait(20)
        reopen(served)

    monkeypatch.setattr(Served, "reopen", slow)
    asks = [threading.Thread(target=shelf.get, args=("a",)) for _ in range(3)]
    for thread in asks:
        thread.start()
    assert begun.wait(20)
    assert len(shelf.get("b").store) == 6
    goes_on.set()
    for thread in asks:
        thread.join(20)
    assert sorted(opened) == ["a", "b"]


def test_many_stores_do_not_keep_all_their_files_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_WITH_FILES", 2)
    for number in range(12):
        small_store(tmp_path / f"{number}.zarr", shards=1)
    shelf, before = Shelf([tmp_path]), handles()
    for _ in range(2):
        for number in range(12):
            with shelf.get(str(number)).reading() as store:
                assert store.answer(tokens(0, 7)) is not None
    assert handles() - before < 4 * 12


def test_looking_at_every_store_lists_their_folder_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(9):
        small_store(tmp_path / f"{number}.zarr", shards=1)
    shelf, listed, iterdir = Shelf([tmp_path]), list[Path](), Path.iterdir
    monkeypatch.setattr(Path, "iterdir", lambda path: listed.append(path) or iterdir(path))
    assert [shelf.get(name).name for name in shelf.names()] == [str(n) for n in range(9)]
    assert listed.count(tmp_path) == 1
