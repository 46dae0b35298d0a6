"""What is pushed or pulled arrives whole or not at all, once, from where it stopped, and is what was sent."""

import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler
from io import FileIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from click.testing import CliRunner

from distill_cli.logitstore import main
from logitstore import incoming
from logitstore.errors import ConfigError, CorruptStoreError, IncompatibleStoreError, LogitstoreError, StoreWriteError
from logitstore.files import LocalFiles
from logitstore.folder_destination import FolderDestination
from logitstore.gc import gc
from logitstore.incoming import FOLDER as INCOMING
from logitstore.incoming import Incoming
from logitstore.merge import convert
from logitstore.parts import part_of
from logitstore.places import push
from logitstore.sealed import GROUP
from logitstore.verify import verify
from logitstore.zarr_store import ZarrStore
from tests.children import finish, forked
from tests.stores import VOCABULARY, contents, guessed, manifest, records, shard_folder, small_store
from tests.test_files import served
from tests.test_parts import whole

ROOT = Path(__file__).parent.parent
KILLS = int(os.environ.get("LOGITSTORE_KILLS", "3"))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> ZarrStore:
    """A store of three shards and 15 MB."""
    made = manifest(hidden_layers=(0, 1, 2), hidden_size=4096)
    store = ZarrStore.create(tmp_path_factory.mktemp("made") / "s", made, VOCABULARY)
    for seed in range(3):
        store.write_documents(records([250, 150], seed, made.recipe))
    store.save_index()
    return store


class RangeHandler(BaseHTTPRequestHandler):
    """Gives files and ranges of them; closes every connection when so many bytes have been given in all."""

    def __init__(self, *arguments: Any, root: Path, given: list[int], until: list[int]) -> None:
        self.root, self.given, self.until = root, given, until
        super().__init__(*arguments)

    def log_message(self, *_arguments: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.root / self.path.split("/", 2)[2]
        if self.given[0] >= self.until[0]:
            self.close_connection = True
            return
        if not path.is_file():
            self.send_error(404)
            return
        data = path.read_bytes()
        first, last = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "bytes=0-")).groups()  # type: ignore[union-attr]
        start, stop = int(first), min(int(last) + 1, len(data)) if last else len(data)
        self.send_response(206 if "Range" in self.headers else 200)
        self.send_header("Content-Length", str(stop - start))
        self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(data)}")
        self.end_headers()
        if self.command == "HEAD":
            return
        for at in range(start, stop, 4096):
            piece = data[at : min(at + 4096, stop)][: max(self.until[0] - self.given[0], 0)]
            self.given[0] += len(piece)
            self.wfile.write(piece)
            if self.given[0] >= self.until[0]:
                self.close_connection = True
                return


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("logitstore.places.PATIENCE_S", 0.1)
    monkeypatch.setattr("logitstore.remote_files.RETRIES", 1)


def same(path: Path, store: ZarrStore) -> bool:
    return contents(path) == contents(store.folder) and verify(path, quiet=True).problems == []


def test_a_folder_is_pulled_once_and_a_zip_file_too(tmp_path: Path) -> None:
    store = whole(tmp_path / "s.zarr")
    report = push(str(store.folder), str(tmp_path / "t"), quiet=True)
    assert same(tmp_path / "t", store) and (report.parts, report.there) == (5, 0)
    report = push(str(store.folder), f"file://{tmp_path}/t", quiet=True)
    assert same(tmp_path / "t", store) and (report.parts, report.there, report.sent_bytes) == (0, 5, 0)
    convert(str(store.folder), tmp_path / "z.zip", quiet=True)
    push(str(tmp_path / "z.zip"), str(tmp_path / "u"), quiet=True)
    assert verify(tmp_path / "u", quiet=True).problems == [] and len(ZarrStore(LocalFiles(tmp_path / "u"), "u")) == 6


def test_only_what_is_missing_is_sent_and_stores_come_together(tmp_path: Path) -> None:
    store = small_store(tmp_path / "s")
    push(str(store.folder), str(tmp_path / "t"), quiet=True)
    there = ZarrStore(LocalFiles(tmp_path / "t"), tmp_path / "t")
    there.write_documents(records([9], seed=8))
    store.write_documents(records([9, 5], seed=9))
    report = push(str(store.folder), str(tmp_path / "t"), quiet=True)
    assert (report.parts, report.there) == (1, 3) and report.sent_bytes < 8000
    there.refresh()
    assert len(there) == 9 and verify(tmp_path / "t", quiet=True).problems == []


def test_a_pull_that_is_cut_at_20_random_bytes_sends_little_twice(made: ZarrStore, tmp_path: Path) -> None:
    size = made.disk_bytes
    given, until, random_ = [0], [0], random.Random(1)
    with served(partial(RangeHandler, root=made.folder, given=given, until=until)) as url:
        for cut in sorted(random_.randrange(size) for _ in range(20)):
            until[0] = cut
            with pytest.raises(LogitstoreError) as caught:
                push(url, str(tmp_path / "t"), quiet=True)
            assert "\n" not in str(caught.value)
            assert not (tmp_path / "t").exists() or verify_or_none(tmp_path / "t")
        until[0] = 1 << 40
        push(url, str(tmp_path / "t"), quiet=True)
    assert same(tmp_path / "t", made)
    assert given[0] < 1.1 * size, given[0] / size


def test_a_pull_goes_on_from_a_server_that_gives_files_as_a_whole_only(made: ZarrStore, tmp_path: Path) -> None:
    there, name = Incoming(tmp_path / "t"), made.shard_names[0]
    part = part_of(name, (made.folder / "shards" / name / GROUP).read_bytes(), made.manifest, "s")
    file = max(part.files, key=lambda file: int(part.files[file]["bytes"]))
    there.begin(part)
    with there.appending(part, file, 0) as handle:
        handle.write(made.files.read(part.path(file))[:-10])
    with served(partial(Whole, directory=str(made.folder.parent))) as url:
        push(url.rsplit("/", 1)[0] + "/s", str(tmp_path / "t"), quiet=True)
    assert same(tmp_path / "t", made)


class Whole(SimpleHTTPRequestHandler):
    """Knows no ranges."""

    def log_message(self, *_arguments: Any) -> None:
        pass


def verify_or_none(path: Path) -> bool:
    """Whether readers see a store that is good, or none."""
    return not (path / "zarr.json").exists() or verify(path, quiet=True).problems == []


def test_a_pull_that_is_killed_at_any_moment_goes_on(made: ZarrStore, tmp_path: Path) -> None:
    code = f"from logitstore.places import push; push({str(made.folder)!r}, {str(tmp_path / 't')!r}, quiet=True)"
    random_, kills = random.Random(2), 0
    for _ in range(KILLS):
        with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT) as process:
            deadline = time.monotonic() + 20
            while not (tmp_path / "t" / INCOMING).exists() and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.001)
            time.sleep(random_.random() * 0.3)
            kills += process.poll() is None
            process.send_signal(signal.SIGKILL)
        assert verify_or_none(tmp_path / "t")
    push(str(made.folder), str(tmp_path / "t"), quiet=True)
    assert same(tmp_path / "t", made) and kills


def test_a_store_with_one_flipped_byte_is_refused_before_anything_is_sent(tmp_path: Path) -> None:
    store = small_store(tmp_path / "s")
    file = shard_folder(store, 1) / "entries-0" / "c" / "0" / "0"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)
    result = CliRunner().invoke(main, ["push", str(store.folder), str(tmp_path / "t"), "--quiet"])
    assert result.exit_code == 2 and not (tmp_path / "t").exists()
    assert re.search(
        r"Error: .*/entries-0/c/0/0: its bytes are not those.* `logitstore verify --repair`", result.output
    )


def test_damage_behind_http_is_refused_and_is_not_kept(made: ZarrStore, tmp_path: Path) -> None:
    shutil.copytree(made.folder, tmp_path / "s")
    file = next((tmp_path / "s" / "shards").glob("*/hidden-1/c/0/0"))
    data = file.read_bytes()
    with served(partial(RangeHandler, root=tmp_path / "s", given=[0], until=[1 << 40])) as url:
        for bad in (data[:-9] + b"x" + data[-8:], b"x" + data[1:]):
            file.write_bytes(bad)
            with pytest.raises(CorruptStoreError, match="hidden-1/c/0/0: its bytes are not those"):
                push(url, str(tmp_path / "t"), quiet=True)
            assert verify_or_none(tmp_path / "t")
        file.write_bytes(data)
        push(url, str(tmp_path / "t"), quiet=True)
    assert same(tmp_path / "t", made)


def test_what_a_power_loss_left_in_a_part_is_fetched_again(made: ZarrStore, tmp_path: Path) -> None:
    with FolderDestination.opened(tmp_path / "t"):
        pass
    name = made.shard_names[0]
    shutil.copytree(made.folder / "shards" / name, tmp_path / "t" / INCOMING / "shards" / name)
    file = tmp_path / "t" / INCOMING / "shards" / name / "hidden-0" / "c" / "0" / "0"
    file.write_bytes(bytes(file.stat().st_size - 5))
    push(str(made.folder), str(tmp_path / "t"), quiet=True)
    assert same(tmp_path / "t", made)


def test_another_store_is_refused_in_one_line(tmp_path: Path) -> None:
    small_store(tmp_path / "s")
    ZarrStore.create(tmp_path / "t", manifest(seed=3), VOCABULARY)
    before = contents(tmp_path)
    with pytest.raises(IncompatibleStoreError, match=r"holds another store: its seed is 3, that of .* is 0; name"):
        push(str(tmp_path / "s"), str(tmp_path / "t"), quiet=True)
    assert contents(tmp_path) == before


def test_a_shard_of_the_same_documents_with_other_bytes_stays(tmp_path: Path) -> None:
    store, there = small_store(tmp_path / "s", shards=1), ZarrStore.create(tmp_path / "t", manifest(), VOCABULARY)
    rng = np.random.default_rng(9)
    there.write_documents([guessed(store.token_ids(number), store.manifest.recipe, rng) for number in range(3)])
    before = contents(there.folder / "shards")
    assert before.keys() == contents(store.folder / "shards").keys() and before != contents(store.folder / "shards")
    report = push(str(store.folder), str(there.folder), quiet=True)
    assert contents(there.folder / "shards") == before
    assert report.to_text("t").startswith("t: 0 parts moved, 0 bytes sent; 2 were there, 1 of them with other bytes")


def test_two_pulls_into_one_folder_are_one_too_many(tmp_path: Path) -> None:
    store = small_store(tmp_path / "s")
    with FolderDestination.opened(tmp_path / "t"), pytest.raises(StoreWriteError, match="another process is moving"):
        push(str(store.folder), str(tmp_path / "t"), quiet=True)
    push(str(store.folder), str(tmp_path / "t"), quiet=True)
    assert same(tmp_path / "t", store) is False  # it has no index yet
    store.save_index()
    assert same(tmp_path / "t", store)


def test_a_disk_that_is_full_is_told_first_or_leaves_what_arrived(
    made: ZarrStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("logitstore.folder_destination.shutil.disk_usage", lambda _: shutil._ntuple_diskusage(9, 8, 1))  # type: ignore[attr-defined]
        with pytest.raises(StoreWriteError, match=r"t has 1 bytes free, .* are needed; free some"):
            push(str(made.folder), str(tmp_path / "t"), quiet=True)
    assert not (tmp_path / "t").exists()

    def full() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        with pytest.raises(StoreWriteError, match=r"t cannot be written: File too large; nothing that was finished"):
            push(str(made.folder), str(tmp_path / "t"), quiet=True)

    finish(forked(full))
    assert verify_or_none(tmp_path / "t") and (tmp_path / "t" / INCOMING / "shards").exists()
    push(str(made.folder), str(tmp_path / "t"), quiet=True)
    assert same(tmp_path / "t", made)


def test_a_server_that_lies_about_sizes_ends_in_one_line(tmp_path: Path) -> None:
    store = small_store(tmp_path / "s")
    store.save_index()

    class Endless(RangeHandler):
        def do_GET(self) -> None:
            if not self.path.endswith("/zarr.json"):
                super().do_GET()
                return
            self.send_response(200)
            self.end_headers()
            for _ in range(64):
                self.wfile.write(bytes(1 << 20))

    with served(partial(Endless, root=store.folder, given=[0], until=[1 << 40])) as url:
        with pytest.raises(LogitstoreError) as caught:
            push(url, str(tmp_path / "t"), quiet=True)
        assert "\n" not in str(caught.value) and not (tmp_path / "t").exists()


def test_places_that_take_no_store_are_one_line(tmp_path: Path) -> None:
    store = small_store(tmp_path / "s")
    convert(str(store.folder), tmp_path / "l.lmdb", quiet=True)
    for source, place, message in (
        (tmp_path / "l.lmdb", tmp_path / "t", "is an LMDB file, .* type `logitstore convert .*l.lmdb .*l.zarr` first"),
        (store.folder, tmp_path / "t.zip", r"t.zip is no folder; type one, as in .*t\.zarr"),
        (store.folder, store.folder / "t", "lies inside .*s, which is a store"),
        (store.folder, tmp_path, r"holds l.lmdb, which is no part of a store; type a folder of the store's own"),
        (store.folder, "", "a place is empty; type a folder"),
        ("", tmp_path / "t", "a place is empty; type a folder"),
    ):
        with pytest.raises(ConfigError, match=message):
            push(str(source), str(place), quiet=True)
    result = CliRunner().invoke(main, ["pull", str(tmp_path / "none"), str(tmp_path / "t")])
    assert result.exit_code == 2 and result.output.startswith("Error: there is no store at")
    assert not (tmp_path / "t").exists()


def test_what_a_stopped_pull_left_is_garbage_when_nobody_goes_on(made: ZarrStore, tmp_path: Path) -> None:
    push(str(made.folder), str(tmp_path / "t"), quiet=True)
    left = tmp_path / "t" / INCOMING / "shards" / ("0" * 16) / "zarr.json"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"{}")
    with FolderDestination.opened(tmp_path / "t"):
        assert [kept.path.name for kept in gc(tmp_path / "t").kept] == [INCOMING] and left.exists()
    for path in (left, *list(left.parents)[:3]):
        os.utime(path, (0, 0))
    assert [removed.path.name for removed in gc(tmp_path / "t").removed] == [INCOMING]
    assert same(tmp_path / "t", made)


def test_ctrl_c_says_that_the_same_command_goes_on(made: ZarrStore, tmp_path: Path) -> None:
    with served(partial(Slow, root=made.folder, given=[0], until=[1 << 40])) as url:
        code = "from distill_cli.logitstore import main; main()"
        command = [sys.executable, "-c", code, "pull", url, str(tmp_path / "t")]
        with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
            try:
                wait_for(lambda: any((tmp_path / "t").rglob("hidden-0/c/0/0")))
                process.send_signal(signal.SIGINT)
                _, told = process.communicate(timeout=30)
            finally:
                process.kill()
    assert process.returncode == 130 and "type the same command to go on" in told and "Traceback" not in told


class Slow(RangeHandler):
    """Takes its time."""

    def do_GET(self) -> None:
        if "hidden" in self.path:
            time.sleep(0.3 if "hidden-0" in self.path else 3)
        super().do_GET()


def wait_for(condition: Any) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_two_writers_share_a_plain_folder(tmp_path: Path) -> None:
    store = small_store(tmp_path / "s", shards=1)

    def write(seed: int) -> None:
        mine = ZarrStore(LocalFiles(store.folder), store.folder)
        for step in range(5):
            with mine.writer(f"writer-{seed}") as writer:
                writer.append(records([6, 9], seed=10 * seed + step))
                writer.commit(list(writer.pending))

    def pull() -> None:
        push(str(store.folder), str(tmp_path / "t"), quiet=True)

    finish(*[forked(partial(write, seed)) for seed in (1, 2)], forked(pull))
    pull()
    store.refresh()
    assert len(store) == 23 and verify(store.folder, quiet=True).problems == []
    assert verify(tmp_path / "t", quiet=True).problems == [] and verify(tmp_path / "t", quiet=True).documents == 23


def test_a_pull_begins_where_another_has_just_ended(tmp_path: Path) -> None:
    left, open_locked = [tmp_path / "s" / INCOMING], incoming.open_locked

    def after_another(path: Path) -> FileIO:
        if left:
            left.pop().rmdir()
        return open_locked(path)

    with patch.object(incoming, "open_locked", after_another), Incoming(tmp_path / "s").alone():
        assert not left
