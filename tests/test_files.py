"""A store reads equal wherever its files are, and a place that lies or fails is one clear line within bounded time."""

import shutil
import socket
import struct
import threading
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from weakref import WeakSet

import numpy as np
import obstore
import pytest
from obstore.store import MemoryStore

from logitstore.errors import (
    CorruptStoreError,
    ServiceError,
    ServiceLostError,
    StoreError,
    StoreFormatError,
    StoreLostError,
    StoreWriteError,
)
from logitstore.files import OPEN_FILES, CannotList, LocalFiles, ZipFiles
from logitstore.http_files import HttpFiles
from logitstore.remote_files import RemoteFiles
from logitstore.service_client import ServiceClient
from logitstore.store import open_store
from logitstore.verify import verify
from logitstore.zarr_store import ZarrStore
from tests.stores import contents, records, shard_folder, small_store, tokens

LENGTHS = (7, 2, 40)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = small_store(tmp_path_factory.mktemp("made") / "s", shards=2, lengths=LENGTHS)
    store.save_index()
    return store.folder


@pytest.fixture
def store(tmp_path: Path, made: Path) -> ZarrStore:
    shutil.copytree(made, tmp_path / "s")
    return ZarrStore(LocalFiles(tmp_path / "s"), tmp_path / "s")


def assert_reads_equal(found: Any, expected: ZarrStore) -> None:
    assert (len(found), found.positions, found.disk_bytes) == (6, 92, expected.disk_bytes)
    assert found.vocabulary == expected.vocabulary and found.manifest == expected.manifest
    for number in range(6):
        (ids, targets), (same_ids, same) = found.document(number), expected.document(number)
        assert ids.tolist() == same_ids.tolist() and (targets.weights == same.weights).all()
    assert found.answered(tokens(2, 40)[:35]) == 34 and found.get(tokens(9, 40)) is None
    with pytest.raises(StoreWriteError, match="can only be read; type a folder"):
        found.writer("build")


# ---- a folder -------------------------------------------------------------------------------------------------------


def test_a_folder_gives_parts_of_files_and_no_hidden_ones(tmp_path: Path) -> None:
    for name in ("a", "shards/b/c", ".hidden", "shards/.partial-x/d"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"0123456789")
    files = LocalFiles(tmp_path)
    assert files.names() == ["a", "shards/b/c"] and files.names("shards") == ["b/c"]
    assert files.folders("shards") == {"b"} and files.folders("none") == set()
    assert files.folders("", {"a", "c"}) == {"a", "shards"}  # what is known is not looked at, and is there or not
    for name in files.names():
        assert (files.read(name), files.read(name, 3), files.read(name, 3, 5)) == (b"0123456789", b"3456789", b"34")
        assert (files.read(name, 8, 99), files.read(name, 12), files.read(name, 5, 2)) == (b"89", b"", b"")
        assert files.size(name) == 10 and files.mapped(name).tobytes() == b"0123456789"
    for name in ("none", "shards/none"):
        with pytest.raises(FileNotFoundError):
            files.read(name)


def test_a_folder_keeps_few_files_open_and_many_threads_read_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LocalFiles, "_all", WeakSet())  # those of other tests do not count
    names = [f"shards/{i:03}" for i in range(2 * OPEN_FILES)]
    (tmp_path / "shards").mkdir()
    for name in names:
        (tmp_path / name).write_bytes(name.encode())
    files, wrong = LocalFiles(tmp_path), []

    def read(seed: int) -> None:
        for i in np.random.default_rng(seed).integers(0, len(names), 2_000):
            if files.read(names[i]) != names[i].encode():
                wrong.append(i)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [] and len(files._handles) == OPEN_FILES
    files.close()
    assert files.read(names[0]) == names[0].encode()


# ---- a zip file -----------------------------------------------------------------------------------------------------


def test_many_folders_together_keep_no_more_than_two_may(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LocalFiles, "_all", WeakSet())
    (tmp_path / "shards").mkdir()
    for i in range(OPEN_FILES):
        (tmp_path / f"shards/{i}").write_bytes(b"%d" % i)
    for count in (1, 2, 8, 3 * OPEN_FILES):
        folders = [LocalFiles(tmp_path) for _ in range(count)]
        for files in folders:
            assert all(files.read(f"shards/{i}") == b"%d" % i for i in range(OPEN_FILES))
        kept = sum(len(files._handles) for files in folders)
        assert kept == max(count, min(2, count) * OPEN_FILES)
        del files, folders


def zipped(folder: Path, compression: int = zipfile.ZIP_STORED, extra: dict[str, bytes] | None = None) -> Path:
    path = folder.with_suffix(".zip")
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in (contents(folder) | (extra or {})).items():
            archive.writestr(name, data)
    return path


def test_a_store_in_a_zip_file_reads_equal_and_verifies(store: ZarrStore) -> None:
    path = zipped(store.folder, extra={".journal-build": b"x", "folder/": b""})
    assert_reads_equal(open_store(path), store)
    report, same = verify(path, quiet=True), verify(store.folder, quiet=True)
    assert report == same and report.problems == []
    path.write_bytes(b"#!/bin/sh\n" + path.read_bytes())  # something before it, as in a self-extracting one
    assert_reads_equal(open_store(path), store)


def test_a_flipped_byte_of_a_zip_file_is_never_read_as_numbers(store: ZarrStore) -> None:
    path = zipped(store.folder)
    data, expected = path.read_bytes(), [store.document(n)[1].weights.tobytes() for n in range(6)]
    directory = data.index(b"PK\1\2")
    rng = np.random.default_rng(0)
    noticed = 0
    for at in (*rng.integers(0, directory, 100).tolist(), *rng.integers(directory, len(data), 150).tolist()):
        flipped = bytearray(data)
        flipped[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(flipped)
        try:
            found = open_store(path)
            numbers = [found.document(n)[1].weights.tobytes() for n in range(len(found))]
            assert numbers == expected or len(found) < 6  # a member's name was hit: that shard is not there
        except StoreError as error:
            noticed += 1
            assert "\n" not in str(error)
    assert noticed > 150


@pytest.mark.parametrize("part", [0.0, 0.3, 0.7, 0.99])
def test_a_zip_file_that_was_cut_is_refused(store: ZarrStore, part: float) -> None:
    path = zipped(store.folder)
    data = path.read_bytes()
    path.write_bytes(data[: int(part * len(data))])
    with pytest.raises(StoreFormatError, match=r"s\.zip is a file, .* is no zip file .*; type the path"):
        open_store(path)


def changed_directory(data: bytes, name: bytes, field: int, form: str, value: int) -> bytes:
    """A zip file of which the directory says something else of one member."""
    entry = data.index(b"PK\1\2")
    while data[entry + 46 : entry + 46 + len(name)] != name:
        entry = data.index(b"PK\1\2", entry + 4)
    changed = bytearray(data)
    struct.pack_into(form, changed, entry + field, value)
    return bytes(changed)


LIES = {
    "compressed": (10, "<H", 8, "is compressed or encrypted"),
    "encrypted": (8, "<H", 1, "is compressed or encrypted"),
    "newer": (6, "<H", 200, "is no zip file"),
    "begins beyond": (42, "<I", 1 << 31, "lies outside of it"),
    "begins elsewhere": (42, "<I", 7, "is not where the zip file's directory says"),
    "too long": (24, "<I", 1 << 31, "lies outside of it"),
    "too short": (24, "<I", 3, "holds 3 bytes instead of"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_zip_files_directory_that_lies_is_refused(store: ZarrStore, lie: str) -> None:
    path = zipped(store.folder)
    *change, message = LIES[lie]
    path.write_bytes(changed_directory(path.read_bytes(), b"shards/zarr.json", *change))
    with pytest.raises((StoreFormatError, CorruptStoreError), match=message) as caught:
        open_store(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["../outside", "shards/../../outside", "/etc/outside"])
def test_a_zip_file_with_members_outside_of_it_is_refused(store: ZarrStore, name: str) -> None:
    with pytest.raises(StoreFormatError, match="lies outside of it"):
        open_store(zipped(store.folder, extra={name: b"x"}))


def test_a_compressed_zip_file_is_refused_with_what_to_type(store: ZarrStore) -> None:
    with pytest.raises(StoreFormatError, match=r"is compressed or encrypted; a store is zipped with .*zip -0"):
        open_store(zipped(store.folder, zipfile.ZIP_DEFLATED))


def test_a_zip_file_of_something_else_is_no_store(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "a").write_bytes(b"a")
    with pytest.raises(StoreFormatError, match=r"is not a store: it has no zarr\.json"):
        open_store(zipped(tmp_path / "x"))


def test_a_zip_file_is_read_a_part_at_a_time(store: ZarrStore) -> None:
    files, name = ZipFiles(zipped(store.folder)), "shards/zarr.json"
    data = (store.folder / name).read_bytes()
    assert (files.read(name), files.read(name, 5), files.read(name, 5, 9)) == (data, data[5:], data[5:9])
    assert (files.read(name, 5, 10**6), files.read(name, 10**6), files.read(name, 9, 5)) == (data[5:], b"", b"")
    assert files.names("index") == LocalFiles(store.folder).names("index")
    with pytest.raises(FileNotFoundError):
        files.size("none")


# ---- a URL ----------------------------------------------------------------------------------------------------------


@contextmanager
def served(handler: Any) -> Iterator[str]:
    """A server on the loopback; its URL."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/s"
        finally:
            server.shutdown()
            thread.join()


class FolderHandler(SimpleHTTPRequestHandler):
    """Serves files, and no listings."""

    asked: list[str]

    def __init__(self, *arguments: Any, asked: list[str], **options: Any) -> None:
        self.asked = asked
        super().__init__(*arguments, **options)

    def log_message(self, *_arguments: Any) -> None:
        self.asked.append(f"{self.command} {self.path}")

    def list_directory(self, _path: Any) -> None:
        self.send_error(403)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("logitstore.remote_files.TIMEOUT_S", 1)
    monkeypatch.setattr("logitstore.remote_files.RETRIES", 2)
    monkeypatch.setattr("logitstore.http_client.SILENT_S", 1)
    monkeypatch.setattr("logitstore.http_client.PATIENCE_S", 2)


def test_a_store_behind_http_reads_equal_and_each_file_is_fetched_once(store: ZarrStore) -> None:
    asked: list[str] = []
    with served(partial(FolderHandler, directory=store.folder.parent, asked=asked)) as url:
        found = open_store(url)
        assert not any("/s/shards/" in line and not line.endswith("/s/shards/zarr.json") for line in asked)
        assert_reads_equal(found, store)
        fetched = [line for line in asked if line.startswith("GET /s/") and "/index/" not in line]
        assert len(fetched) == len(set(fetched)) and {line.split()[0] for line in asked} == {"GET", "HEAD"}


def test_plain_http_without_an_index_is_one_line(store: ZarrStore) -> None:
    (store.folder / "index" / "zarr.json").unlink()
    with served(partial(FolderHandler, directory=store.folder.parent, asked=[])) as url:
        with pytest.raises(StoreFormatError, match=r"s has no index, .* type its `logitstore build` command again"):
            open_store(url)
        with pytest.raises(StoreFormatError, match=r"none is not a store: it has no zarr\.json; type"):
            open_store(f"{url}/none")
        with pytest.raises(CannotList):
            HttpFiles(ServiceClient(url), lists=False).folders("shards")


def test_damage_behind_http_is_noticed_and_a_lost_file_is_one_line(store: ZarrStore) -> None:
    file = shard_folder(store) / "entries-0" / "c" / "0" / "0"
    data = file.read_bytes()
    with served(partial(FolderHandler, directory=store.folder.parent, asked=[])) as url:
        for damage, message in ((data[:-1], "bytes instead of"), (data[:-1] + b"x", "not those"), (None, "no such")):
            file.unlink() if damage is None else file.write_bytes(damage)
            with pytest.raises(CorruptStoreError, match=message) as caught:
                open_store(url).document(0)
            assert "\n" not in str(caught.value)


def test_a_server_that_is_gone_is_told_as_that_and_not_as_damage(
    store: ZarrStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("logitstore.remote_files.RETRIES", 0)
    with served(partial(FolderHandler, directory=store.folder.parent, asked=[])) as url:
        found = ZarrStore(RemoteFiles(url, listing=list(contents(store.folder))), url)
    with pytest.raises(StoreLostError, match=r"cannot be read now .*, which is no damage") as caught:
        found.document(0)
    assert "\n" not in str(caught.value)


class FailingHandler(FolderHandler):
    """Serves the store's root, then fails in one way or another."""

    way: str

    def __init__(self, *arguments: Any, way: str, **options: Any) -> None:
        self.way = way
        super().__init__(*arguments, **options)

    def do_GET(self) -> None:
        if not self.fail():
            super().do_GET()

    def do_HEAD(self) -> None:
        if not self.fail():
            super().do_HEAD()

    def fail(self) -> bool:
        first = self.path.split("/")[2]
        if not self.way.endswith(" at once") and first == "zarr.json":
            return False
        if self.way.endswith(" index") and first != "index":
            return False
        match self.way.split()[0]:
            case "500":
                self.send_error(500)
            case "closed":
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
            case "silent":
                time.sleep(3)
            case "short":
                self.send_response(200)
                self.send_header("Content-Length", "100")
                self.end_headers()
                self.wfile.write(b"{}")
                self.close_connection = True
        return True


@pytest.mark.parametrize(
    "way", ["500 at once", "500", "500 index", "closed at once", "closed", "silent index", "short"]
)
def test_a_server_that_fails_is_one_line_within_bounded_time(store: ZarrStore, way: str) -> None:
    begin = time.monotonic()
    handler = partial(FailingHandler, directory=store.folder.parent, asked=[], way=way)
    told = pytest.raises((ServiceError, StoreError), match=r"does not answer|bytes instead of")
    with served(handler) as url, told as caught:
        open_store(url).document(0)
    assert "\n" not in str(caught.value) and time.monotonic() - begin < 30


def test_nobody_there_is_one_line() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/s"
    with pytest.raises(
        ServiceLostError, match=r"does not answer, asked \d+ times .*; is the service up, and is this its"
    ):
        open_store(url)
    for url in ("nothing://x", "s3://"):
        with pytest.raises(StoreFormatError, match=r"is no URL that obstore knows|cannot be read"):
            open_store(url)


def test_a_file_url_is_listed_and_reads_equal_without_an_index(store: ZarrStore) -> None:
    assert_reads_equal(open_store(f"file://{store.folder}"), store)
    other = small_store(store.folder.with_name("t"), lengths=LENGTHS)
    assert_reads_equal(open_store(f"file://{other.folder}"), other)


def test_an_object_store_is_listed_and_reads_equal(store: ZarrStore) -> None:
    files = RemoteFiles("memory:///")
    for name, data in (contents(store.folder) | {".journal-build": b"x", "shards/.partial-x/a": b"x"}).items():
        obstore.put(files._store, name, data)
    assert isinstance(files._store, MemoryStore)
    local = LocalFiles(store.folder)
    assert files.names() == local.names() and files.names("shards") == local.names("shards")
    assert files.folders("shards") == local.folders("shards") and files.folders("none") == set()
    assert files.read("zarr.json", 3, 9) == local.read("zarr.json", 3, 9)
    assert_reads_equal(ZarrStore(files, "memory:///"), store)


def test_a_remote_store_sees_new_shards_after_a_refresh(store: ZarrStore) -> None:
    reader = open_store(f"file://{store.folder}")
    store.write_documents(records([9], seed=7))
    reader.refresh()
    assert len(reader) == 7 and reader.get(tokens(700, 9)) is not None


def test_files_behind_a_url_are_fetched_by_several_threads_at_once(store: ZarrStore) -> None:
    asked: set[str] = set()

    class Together(SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.add(self.path)
            end = time.monotonic() + 2
            while len(asked) < 2 and time.monotonic() < end:
                time.sleep(0.01)
            self.send_error(404) if len(asked) < 2 else super().do_GET()

        def log_message(self, *_arguments: Any) -> None:
            pass

    with served(partial(Together, directory=str(store.folder.parent))) as url, ThreadPoolExecutor(2) as pool:
        files = RemoteFiles(url.rsplit("/", 1)[0] + "/s")
        names = ["zarr.json", "shards/zarr.json"]
        assert list(pool.map(files.read, names)) == [(store.folder / name).read_bytes() for name in names]


def test_what_was_fetched_is_kept_only_while_there_is_room(store: ZarrStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("logitstore.file_cache.MOST_BYTES", 3_000)
    files = RemoteFiles(f"file://{store.folder}")
    for name in files.names():
        assert files.read(name) == (store.folder / name).read_bytes()
        assert files._kept.size_bytes <= max(3_000, files.size(name))
    assert len(files._kept) < len(files.names())


def test_without_obstore_the_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "obstore", None)
    with pytest.raises(StoreFormatError, match=r"needs obstore; type `pip install 'logitstore\[remote\]'`"):
        open_store("s3://bucket/store")
