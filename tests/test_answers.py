"""Targets over HTTP: every document once however many ask, hostile bodies refused, and never a 500."""

import asyncio
import gc
import json
import shutil
import socket
import struct
import threading
import time
from collections.abc import AsyncGenerator
from concurrent.futures import Future
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
import pytest

from logitstore.files import LocalFiles
from logitstore.journal import ShardWriter
from logitstore.key import document_key
from logitstore.service import answers, desk, limits, shelf
from logitstore.service.access import Access
from logitstore.service.app import create_app
from logitstore.service.desk import Desk
from logitstore.service.tokens import new_token
from logitstore.store import open_store
from logitstore.wire import Kind, read_answers
from logitstore.zarr_store import ZarrStore
from tests.guessing import Guessing, ask, at_once, bytes_of, post, until
from tests.served import running, serving
from tests.stores import VOCABULARY, manifest, small_store, tokens
from tests.stubs import answer, flip

RECIPE = manifest().recipe


@pytest.fixture
def path(tmp_path: Path) -> Path:
    small_store(tmp_path / "s.zarr")
    return tmp_path / "s.zarr"


def missing(count: int, first: int = 5000, length: int = 12) -> list[Any]:
    return [tokens(first + i, length) for i in range(count)]


def frames(content: bytes) -> dict[int, bytes]:
    """What is said of each document, cut as wire.py's first lines say."""
    found, at = {}, 0
    while at < len(content):
        document, kind, size = struct.unpack_from("<IBI", content, at)
        at += 9 + 16 + size
        if kind in (Kind.HIT, Kind.TAUGHT):  # by now the store may have it
            found[document] = content[at - size : at]
    return found


def kinds(url: str, documents: Any, **more: Any) -> list[Kind]:
    return [a.kind for a in sorted(ask(url, documents, **more), key=lambda a: a.document)]


def test_64_who_ask_at_once_for_the_same_100_documents_have_each_computed_once(path: Path) -> None:
    teacher, some = Guessing(), missing(100)
    with serving(path, teacher=teacher) as url:
        body = json.dumps({"documents": [document.tolist() for document in some]}).encode()
        raw = at_once(64, lambda _: post(url, body).content)
    assert all(frames(content) == frames(raw[0]) for content in raw)
    found = {a.document: bytes_of(a.record) for a in read_answers([raw[0]], some, RECIPE)}
    assert [found[i] for i in range(100)] == [bytes_of(answer(d, RECIPE)) for d in some]
    assert sorted(teacher.computed) == sorted(map(document_key, some))
    store = open_store(path)
    assert len(store) == 106 and store.answer(some[7]) is not None


def test_what_the_store_has_is_what_it_has_on_disk_and_no_teacher_is_asked(path: Path) -> None:
    teacher, store = Guessing(), open_store(path)
    known = [store.token_ids(number) for number in range(len(store))]
    with serving(path, teacher=teacher) as url:
        found = ask(url, known)
    assert [a.kind for a in found] == [Kind.HIT] * 6 and not teacher.computed
    assert [bytes_of(a.record) for a in found] == [bytes_of(store.answer(d)) for d in known]


def test_the_beginning_of_a_known_document_is_answered_as_far_as_it_is_known(path: Path) -> None:
    import numpy as np

    with ShardWriter(ZarrStore.create(path.with_name("t.zarr"), manifest(), VOCABULARY), "x") as writer:
        writer.append([answer(tokens(9, 40), RECIPE)])
        writer.commit(list(writer.pending))
    longer = np.concatenate([tokens(9, 40), tokens(10, 8)])
    with serving(path.with_name("t.zarr")) as url:
        hit, miss = ask(url, [longer], store="t")
    assert (hit.kind, miss.kind) == (Kind.HIT, Kind.MISSING)
    assert hit.record is not None and hit.record.token_ids.tolist() == tokens(9, 40).tolist()


def test_a_document_that_the_teacher_fails_on_is_told_so_and_the_others_are_answered(path: Path) -> None:
    teacher, some = Guessing(), missing(5)
    teacher.faults[document_key(some[2])] = RuntimeError("\udcff\x00 is no text")
    with serving(path, teacher=teacher) as url:
        found = {a.document: a for a in ask(url, some)}
    assert [found[i].kind for i in range(5)] == [Kind.TAUGHT, Kind.TAUGHT, Kind.FAILED, Kind.TAUGHT, Kind.TAUGHT]
    assert "RuntimeError" in found[2].reason


def test_a_full_disk_is_told_as_full_and_the_same_is_answered_later(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from logitstore.errors import StoreWriteError

    def full(*_: object) -> None:
        raise StoreWriteError("the disk is full")

    with serving(path, teacher=Guessing()) as url:
        monkeypatch.setattr(ShardWriter, "append", full)
        assert kinds(url, missing(3)) == [Kind.FULL] * 3
        monkeypatch.undo()
        assert kinds(url, missing(3)) == [Kind.TAUGHT] * 3


def test_a_full_queue_is_429_with_retry_after_and_hits_go_on(path: Path) -> None:
    teacher = Guessing()
    teacher.goes_on.clear()
    with serving(path, teacher=teacher, queue_tokens=20) as url:
        first = threading.Thread(target=ask, args=(url, missing(40)))  # more than the queue, and nothing waits
        first.start()
        assert teacher.begun.wait(20)
        refused = post(url, json.dumps({"documents": [[1, 2, 3]]}).encode())
        assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
        assert kinds(url, [tokens(0, 7)]) == [Kind.HIT]
        teacher.goes_on.set()
        first.join(20)


def test_who_waits_for_the_teacher_keeps_nobody_from_what_the_store_has(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers, "MOST_AT_ONCE", 2)
    teacher = Guessing()
    teacher.goes_on.clear()
    with serving(path, teacher=teacher) as url:
        waiting = [threading.Thread(target=ask, args=(url, missing(2))) for _ in range(6)]
        for thread in waiting:
            thread.start()
            time.sleep(0.05)
        assert kinds(url, [tokens(0, 7)]) == [Kind.HIT]
        teacher.goes_on.set()
        for thread in waiting:
            thread.join(20)
    assert len(teacher.computed) == 2


def test_an_answer_that_waits_longer_than_a_silent_client_may_is_not_cut(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "SILENT_S", 0.3)
    monkeypatch.setattr(answers, "SIGN_OF_LIFE_S", 0.1)
    teacher = Guessing()
    teacher.goes_on.clear()
    with serving(path, teacher=teacher) as url:
        threading.Timer(1.2, teacher.goes_on.set).start()
        assert kinds(url, missing(1)) == [Kind.TAUGHT]


def test_a_teacher_that_loads_is_waited_for_and_one_that_does_not_load_is_told(path: Path) -> None:
    gate = threading.Event()

    def load() -> Any:
        assert gate.wait(20)
        raise MemoryError

    desks: list[Desk] = []
    with serving(path, teacher=load, desks=desks) as url:
        assert httpx2.get(f"{url}/v1/stores/s").json()["teacher_state"] == "loading"
        assert httpx2.get(f"{url}/ready").status_code == 503
        threading.Timer(0.3, gate.set).start()
        (found,) = ask(url, missing(1))
        assert found.kind == Kind.FAILED and "does not load" in found.reason
        (found,) = ask(url, missing(1))
        assert found.kind == Kind.MISSING and "lost" in found.reason
        assert kinds(url, [tokens(0, 7)]) == [Kind.HIT]


def test_stopping_tells_who_waits_to_come_again(path: Path) -> None:
    teacher, desks = Guessing(), list[Desk]()
    teacher.goes_on.clear()
    with serving(path, teacher=teacher, desks=desks) as url:
        found: list[list[Kind]] = []
        some = missing(3, length=1500)
        waits = threading.Thread(target=lambda: found.append(kinds(url, some)))
        waits.start()
        assert teacher.begun.wait(20)
        stops = threading.Thread(target=desks[0].stop)
        stops.start()
        until(lambda: desks[0]._stopping)
        teacher.goes_on.set()
        waits.join(20)
        stops.join(20)
    assert found == [[Kind.TAUGHT, Kind.FULL, Kind.FULL]]


def test_a_store_deleted_under_the_service_is_404_and_another_in_its_place_is_served(path: Path) -> None:
    with serving(path.parent, teacher=Guessing()) as url:
        assert kinds(url, missing(2)) == [Kind.TAUGHT] * 2
        shutil.rmtree(path)
        assert post(url, b'{"documents": [[1, 2]]}').status_code == 404
        small_store(path, shards=1)
        assert kinds(url, [tokens(0, 7), tokens(100, 7), *missing(1)]) == [Kind.HIT, Kind.TAUGHT, Kind.TAUGHT]
    assert len(open_store(path)) == 5


def damaged(path: Path, file: str) -> tuple[str, Any, Any]:
    """Change a byte in the shard of one document; its name, that document, and one of the other shard."""
    store = ZarrStore(LocalFiles(path), path)
    shard = store.catalog.locate(tokens(0, 7))[0]  # type: ignore[index]
    flip(path / shard.where / file)
    return shard.name, tokens(0, 7), tokens(100, 7)


FILES = ("entries-0/c/0/0", "positions/c/0/0", "documents/c/0/0", "ranks/c/0/0", "zarr.json", "blocks/zarr.json")


@pytest.mark.parametrize(("file", "indexed"), [*((file, True) for file in FILES), ("entries-0/c/0/0", False)])
def test_a_damaged_shard_is_put_aside_and_its_documents_are_computed_again(
    path: Path, file: str, *, indexed: bool
) -> None:
    if indexed:
        open_store(path).save_index()
    teacher = Guessing()
    with serving(path.parent, teacher=teacher) as url:
        name, lost, whole = damaged(path, file)
        assert kinds(url, [whole, lost]) == [Kind.HIT, Kind.TAUGHT]
        assert kinds(url, [whole, lost]) in ([Kind.HIT, Kind.HIT], [Kind.HIT, Kind.TAUGHT])
    assert teacher.computed == [document_key(lost)]
    assert (path / "shards" / f".quarantine-{name}").is_dir()
    assert len(open_store(path)) == 4


@pytest.mark.parametrize("file", FILES)
def test_a_damaged_shard_without_a_teacher_is_an_error_that_names_it_and_stays(path: Path, file: str) -> None:
    open_store(path).save_index()
    with serving(path.parent) as url:
        name, lost, whole = damaged(path, file)
        refused = post(url, json.dumps({"documents": [lost.tolist()]}).encode())
        assert refused.status_code == 503 and name in refused.json()["error"]
        assert kinds(url, [whole]) == [Kind.HIT]
        assert post(url, json.dumps({"documents": [lost.tolist()]}).encode()).status_code == 503
    assert (path / "shards" / name).is_dir()


@pytest.mark.parametrize("later", [False, True])
def test_a_damaged_shard_of_another_teachers_store_stays(path: Path, tmp_path: Path, *, later: bool) -> None:
    open_store(path).save_index()
    loads, stores = threading.Event(), shelf.Shelf([path.parent])

    def load() -> Guessing:
        assert loads.wait(20)
        return Guessing("b" * 32)

    one = Desk(load, 1 << 18, stores=lambda: [stores.get("s")])
    with running(create_app(stores, one, Access(None))) as url:
        one.start()
        if later:  # than the teacher has loaded
            loads.set()
            until(lambda: one.state == "ready")
            shutil.copytree(path, tmp_path / "copy")
            shutil.rmtree(path)
            (tmp_path / "copy").rename(path)
        name, lost, _ = damaged(path, "entries-0/c/0/0")
        assert post(url, json.dumps({"documents": [lost.tolist()]}).encode()).status_code == 503
        loads.set()
        one.stop()
    assert (path / "shards" / name).is_dir()


def test_a_damaged_index_is_taken_away_and_nothing_is_computed_again(path: Path) -> None:
    open_store(path).save_index()
    teacher = Guessing()
    with serving(path.parent, teacher=teacher) as url:
        flip(path / "index" / "keys" / "c" / "0")
        assert kinds(url, [tokens(0, 7), tokens(100, 7)]) == [Kind.HIT, Kind.HIT]
    assert not teacher.computed and len(open_store(path)) == 6


def test_a_shard_that_another_service_has_mended_is_not_put_aside_again(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(desk, "IDLE_S", 0.05)
    monkeypatch.setattr(shelf, "LOOKED_S", 60)  # so that the other one learns of it by the damage alone
    first, second, mended = Guessing(), Guessing(), list[Path]()
    aside = answers.put_shards_aside
    monkeypatch.setattr(answers, "put_shards_aside", lambda place, ids: mended.append(place) or aside(place, ids))
    with serving(path, teacher=first) as one, serving(path, teacher=second) as two:
        name, lost, whole = damaged(path, "entries-0/c/0/0")
        assert kinds(one, [lost, whole]) == [Kind.TAUGHT, Kind.HIT]
        until(lambda: len(list((path / "shards").glob("[0-9a-f]*"))) == 2)
        assert kinds(two, [lost, whole]) == [Kind.HIT, Kind.HIT]
    assert not second.computed and first.computed == [document_key(lost)] and mended == [path]
    assert [p.name for p in (path / "shards").glob(".quarantine*")] == [f".quarantine-{name}"]


def test_a_service_that_only_reads_computes_and_mends_nothing(path: Path) -> None:
    before = sorted(p for p in path.rglob("*"))
    with serving(path, read_only=True) as url:
        assert kinds(url, [tokens(0, 7), *missing(1)]) == [Kind.HIT, Kind.MISSING]
        name, lost, _ = damaged(path, "entries-0/c/0/0")
    with serving(path, read_only=True) as url:
        assert post(url, json.dumps({"documents": [lost.tolist()]}).encode()).status_code == 503
    assert sorted(p for p in path.rglob("*")) == before and name


DEEP = b"[" * 500_000
BAD: dict[str, tuple[bytes, int]] = {
    "nothing": (b"", 400),
    "no JSON": (b"{", 400),
    "deep": (DEEP, 400),
    "deep in a field": (b'{"documents": ' + DEEP, 400),
    "bad UTF-8": (b'{"documents": [["\xff"]]}', 400),
    "a list": (b"[]", 422),
    "another field": (b'{"documents": [], "more": 1}', 422),
    "no documents": (b"{}", 422),
    "documents that are none": (b'{"documents": 7}', 422),
    "a document that is none": (b'{"documents": [7]}', 422),
    "a text": (b'{"documents": ["ab"]}', 422),
    "an object": (b'{"documents": [{"0": 1, "1": 2}]}', 422),
    "one token": (b'{"documents": [[1]]}', 422),
    "beyond the vocabulary": (b'{"documents": [[1, 300]]}', 422),
    "below": (b'{"documents": [[1, -1]]}', 422),
    "NaN": (b'{"documents": [[1, NaN]]}', 422),
    "Infinity": (b'{"documents": [[1, -Infinity]]}', 422),
    "huge": (b'{"documents": [[1, ' + b"9" * 4000 + b"]]}", 422),
    "huger": (b'{"documents": [[1, ' + b"9" * 100_000 + b"]]}", 400),
    "1e400": (b'{"documents": [[1, 1e400]]}', 422),
    "a float": (b'{"documents": [[1, 2.0]]}', 422),
    "a bool": (b'{"documents": [[1, true]]}', 422),
    "null": (b'{"documents": [[1, null]]}', 422),
    "nested": (b'{"documents": [[1, [2]]]}', 422),
    "teach is a number": (b'{"documents": [[1, 2]], "teach": 1}', 422),
    "another store": (b'{"documents": [[1, 2]], "fingerprint": "x"}', 409),
    "a fingerprint that is none": (b'{"documents": [[1, 2]], "fingerprint": ["x"]}', 409),
    "the last of two keys counts": (b'{"documents": [[1, 2]], "documents": 7}', 422),
    "a million tiny documents": (b'{"documents": [' + b"[]," * 600_000 + b"[]]}", 413),
    "many documents": (b'{"documents": [' + b"[1,2]," * 256 + b"[1,2]]}", 413),
    "many tokens": (b'{"documents": [' + (b"[" + b"1," * 32767 + b"1],") * 4 + b"[1,2]]}", 413),
    "a long document": (b'{"documents": [[' + b"1," * 32768 + b"1]]}", 422),
    "too long": (b" " * (9 << 20), 413),
}


@pytest.mark.parametrize("body", [body for body, _ in BAD.values()], ids=list(BAD))
def test_a_body_that_no_client_sends_is_refused_in_one_line(path: Path, body: bytes) -> None:
    log: list[str] = []
    with serving(path, teacher=Guessing(), log=log.append) as url:
        refused = post(url, body)
        assert refused.status_code == next(status for b, status in BAD.values() if b is body)
        assert set(refused.json()) == {"error"} and "\n" not in refused.json()["error"]
        assert kinds(url, [tokens(0, 7)]) == [Kind.HIT]


def test_a_body_in_a_coding_that_nobody_knows_is_415(path: Path) -> None:
    with serving(path) as url:
        assert post(url, b"\x1f\x8b", **{"Content-Encoding": "gzip"}).status_code == 415
        assert post(url, b'{"documents": []}', **{"Content-Encoding": "identity"}).status_code == 200


def test_a_token_teaches_only_if_it_says_so(path: Path, tmp_path: Path) -> None:
    file, teacher = tmp_path / "tokens.json", Guessing()
    reads, teaches = new_token(file, "r", ["read"]), new_token(file, "t", ["read", "teach"])
    with serving(path, teacher=teacher, tokens=file) as url:
        (found,) = ask(url, missing(1), token=reads)
        assert found.kind == Kind.MISSING and "does not allow to teach" in found.reason and not teacher.computed
        assert kinds(url, missing(1), token=teaches, teach=False) == [Kind.MISSING]
        assert kinds(url, missing(1), token=teaches) == [Kind.TAUGHT]


def test_a_client_that_goes_away_leaves_its_document_to_the_others(path: Path) -> None:
    teacher, log = Guessing(), list[str]()
    teacher.goes_on.clear()
    with serving(path, teacher=teacher, log=log.append) as url:
        for _ in range(answers.MOST_AT_ONCE + 6):  # each would hold a place for ever
            with socket.create_connection((urlsplit(url).hostname, urlsplit(url).port)) as gone:
                body = json.dumps({"documents": [missing(1)[0].tolist()]}).encode()
                head = f"POST /v1/stores/s/targets HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
                gone.sendall(head.encode() + body)
                gone.recv(100)
        threading.Timer(0.2, teacher.goes_on.set).start()
        assert kinds(url, missing(1)) == [Kind.TAUGHT]
    assert len(teacher.computed) == 1


def test_no_line_of_the_log_has_a_token_a_query_or_a_document(
    path: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file, log, teacher = tmp_path / "tokens.json", list[str](), Guessing()
    token = new_token(file, "t", ["read", "teach"])
    secret_ids = tokens(77, 9)
    teacher.faults[document_key(secret_ids)] = RuntimeError(f"fails on {secret_ids.tolist()}")
    with serving(path, teacher=teacher, tokens=file, log=log.append) as url:
        (found,) = ask(url, [secret_ids], token=token)
        auth = {"Authorization": f"Bearer {token}"}
        httpx2.get(f"{url}/v1/stores/s?query=4711", headers=auth)
        httpx2.get(f"{url}/v1/stores/s", headers={"Authorization": f"Bearer {token}x"})
        post(url, b'{"documents": [[4711, 4712]]}', token=token)
    text = "\n".join(log) + "".join(capfd.readouterr())
    assert found.kind == Kind.FAILED and len(log) >= 4
    assert token.split("_", 2)[2] not in text and "4711" not in text
    assert str(secret_ids.tolist())[1:-1] not in text and token.split("_")[1] in text


def test_what_was_asked_and_answered_is_not_kept_in_memory(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(desk, "IDLE_S", 0.02)

    def futures() -> int:
        """The fewest within half a second: what is on its way comes and goes."""
        counts = []
        for _ in range(10):
            time.sleep(0.05)
            gc.collect()
            counts.append(sum(isinstance(thing, Future | asyncio.Future) for thing in gc.get_objects()))
        return min(counts)

    with serving(path, teacher=Guessing()) as url:
        counts = []
        for number in range(3):
            for at in range(0, 60, 20):
                ask(url, missing(20, 5000 + 100 * number + at))
            until(lambda: not list(path.glob(".journal-*")) or not (path / ".journal-service-0").stat().st_size)
            counts.append(futures())
    assert counts[2] <= counts[1] + 10


def test_an_answer_that_nobody_takes_gives_its_place_back_and_holds_nothing() -> None:
    ended: list[bool] = []

    async def run() -> bool:
        room = asyncio.Semaphore(1)
        await room.acquire()

        async def frames() -> AsyncGenerator[bytes, None]:
            try:
                yield b"known"
            finally:
                ended.append(True)

        async def receive() -> Any:
            await asyncio.sleep(9)

        async def send(message: Any) -> None:
            if message["type"] == "http.response.body":
                raise limits.StalledError

        with pytest.raises(limits.StalledError):
            await answers._Held(answers._Place(room), frames())({"type": "http"}, receive, send)
        return room.locked()

    assert not asyncio.run(run()) and ended
