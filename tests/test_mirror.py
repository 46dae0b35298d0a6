"""A folder holds what a service's store holds, whole and checked, whatever happens on the way."""

import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from logitstore.errors import CorruptStoreError, IncompatibleStoreError, LogitstoreError, ServiceError, StoreWriteError
from logitstore.files import LocalFiles
from logitstore.http_files import HttpFiles
from logitstore.info import info
from logitstore.mirror import Mirror, together
from logitstore.overlay import INDEX, STORE, folder_of, remove
from logitstore.sealed import GROUP, file_digest, seal_group
from logitstore.service_client import ServiceClient
from logitstore.stored_index import write_index
from logitstore.verify import verify
from logitstore.zarr_store import ZarrStore
from tests.faulty_proxy import Fault, Proxy, first, proxied, status
from tests.served import serving
from tests.stores import VOCABULARY, contents, manifest, records, shard_folder, small_store

MOST = 10**9


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("logitstore.http_client.SILENT_S", 1)
    monkeypatch.setattr("logitstore.http_client.PATIENCE_S", 2)
    monkeypatch.setattr("logitstore.http_client.FIRST_WAIT_S", 0.02)


@pytest.fixture
def store(tmp_path: Path) -> ZarrStore:
    made = small_store(tmp_path / "s.zarr", 3, (9, 70, 2))
    made.save_index()
    return made


@pytest.fixture
def served(store: ZarrStore) -> Iterator[tuple[Proxy, str]]:
    with serving(store.folder) as url, proxied(url) as (proxy, near):
        yield proxy, f"{near}/s"


@contextmanager
def mirrored(url: str, overlay: Path, most_bytes: int = MOST) -> Iterator[tuple[Mirror, ZarrStore]]:
    with closing(ServiceClient(url)) as client:
        mirror = Mirror(HttpFiles(client, lists=True), folder_of(overlay, url), most_bytes)
        yield mirror, ZarrStore(mirror, url)


def read_all(store: ZarrStore) -> None:
    for number in range(len(store)):
        store.record(number)


def nothing_half(overlay: Path) -> bool:
    return not [path for path in overlay.rglob(".*") if "removed" not in path.name]


def test_an_index_that_is_replaced_while_it_is_fetched_is_fetched_again(
    store: ZarrStore, served: tuple[Proxy, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch, replaced = Mirror._fetch, list[str]()

    def replacing(mirror: Mirror, remote: HttpFiles, where: str, *more: Any) -> None:
        if where == INDEX and not replaced:
            replaced.append(where)
            store.write_documents(records([40, 50], seed=77))
            store.save_index()
        fetch(mirror, remote, where, *more)

    monkeypatch.setattr(Mirror, "_fetch", replacing)
    with mirrored(served[1], tmp_path / "o") as (_, near):
        assert replaced and len(near) == len(store) == 11
        read_all(near)


def test_what_was_fetched_is_a_store_like_any_other(
    store: ZarrStore, served: tuple[Proxy, str], tmp_path: Path
) -> None:
    with mirrored(served[1], tmp_path / "o") as (mirror, near):
        read_all(near)
        own = mirror.folder / STORE
    assert contents(own) == {k: v for k, v in contents(store.folder).items() if not k.startswith("index/")}
    assert verify(own, quiet=True).problems == [] and info(ZarrStore(mirror._local, own))["digest"] == store.digest()
    assert nothing_half(tmp_path / "o")


def test_all_of_it_costs_the_network_once(served: tuple[Proxy, str], tmp_path: Path) -> None:
    proxy, url = served
    for _ in range(2):
        with mirrored(url, tmp_path / "o") as (_, near):
            read_all(near)
            read_all(near)
    files = [line for line in proxy.asked if line.startswith("GET /s/") and "zarr.json" not in line]
    assert sorted(files) == sorted(set(files))
    again = [line for line in set(proxy.asked) if proxy.asked.count(line) > 1]
    assert sorted(again) == ["GET /s/index/zarr.json", "GET /s/zarr.json", "GET /v1/stores/s/shards"]


def test_an_epoch_takes_about_as_many_bytes_as_the_store_has(tmp_path: Path) -> None:
    store = small_store(tmp_path / "s.zarr", 2, (1000,) * 20)
    store.save_index()
    with serving(store.folder) as url, proxied(url) as (proxy, near_url):
        with mirrored(f"{near_url}/s", tmp_path / "o") as (_, near):
            read_all(near)
        assert store.disk_bytes < proxy.sent_bytes < 1.1 * store.disk_bytes


def test_only_the_shards_that_are_read_are_fetched(store: ZarrStore, served: tuple[Proxy, str], tmp_path: Path) -> None:
    with mirrored(served[1], tmp_path / "o") as (mirror, near):
        assert all(near.answered(store.token_ids(number)) for number in range(len(store)))
        assert not mirror._local.folders("shards")
        near.record(0)
        assert mirror._local.folders("shards") == {store.shard_names[0]}


def test_shards_are_looked_into_together(store: ZarrStore, served: tuple[Proxy, str], tmp_path: Path) -> None:
    with mirrored(served[1], tmp_path / "o") as (_, near):
        begun = len(served[0].asked)
        near.answered(store.token_ids(0))
        assert len(served[0].asked) == begun + 3 * store.shard_count
        assert all(near.answered(store.token_ids(number)) for number in range(len(store)))
        assert len(served[0].asked) == begun + 3 * store.shard_count


@pytest.mark.parametrize("fault", [Fault("flip", 3), Fault("cut", 3), Fault("close"), status(503)])
def test_a_file_that_arrives_damaged_is_fetched_again(served: tuple[Proxy, str], tmp_path: Path, fault: Fault) -> None:
    proxy, url = served
    with mirrored(url, tmp_path / "o") as (mirror, near):
        proxy.fault = first(1, fault, "entries-0/c/0/0")
        read_all(near)
        assert verify(mirror.folder / STORE, quiet=True).problems == []


def test_a_shard_that_the_service_has_damaged_is_told_and_not_kept(
    store: ZarrStore, served: tuple[Proxy, str], tmp_path: Path
) -> None:
    for number, damage in enumerate((lambda f: f.write_bytes(f.read_bytes()[:-1] + b"\0"), lambda f: f.unlink())):
        with mirrored(served[1], tmp_path / "o") as (mirror, near):
            damage(shard_folder(store, number) / "entries-0" / "c" / "0" / "0")
            with pytest.raises(CorruptStoreError, match=r"/entries-0/c/0/0: (its bytes are not|the service has no)"):
                read_all(near)
            assert store.shard_names[number] not in mirror._local.folders("shards") and nothing_half(tmp_path / "o")
        shutil.rmtree(tmp_path / "o")


def test_a_shard_that_the_service_mended_meanwhile_is_looked_into_again(
    store: ZarrStore, served: tuple[Proxy, str], tmp_path: Path
) -> None:
    with mirrored(served[1], tmp_path / "o") as (_, near):
        near.answered(store.token_ids(0))  # its entry is known now
        folder, name = shard_folder(store), store.shard_names[0]
        entry = json.loads((folder / GROUP).read_text())["attributes"]
        file = folder / "entries-0" / GROUP
        file.write_bytes(file.read_bytes() + b"\n")
        entry["files"][f"entries-0/{GROUP}"] = {
            "bytes": file.stat().st_size,
            "digest": file_digest(file.read_bytes()),
        }
        entry.pop("digest")
        (folder / GROUP).write_bytes(seal_group(entry))
        near.files._fetch_shard(near.files.remote, name)  # type: ignore[attr-defined]
        assert near.files.folders("shards") >= {name}


def test_another_store_at_the_url_is_refused(store: ZarrStore, served: tuple[Proxy, str], tmp_path: Path) -> None:
    with mirrored(served[1], tmp_path / "o") as (_, near):
        shutil.rmtree(store.folder)
        other = ZarrStore.create(store.folder, manifest(seed=5), VOCABULARY)
        with pytest.raises(LogitstoreError, match=r"another store|no such file|404"):
            read_all(near)
    told = pytest.raises(IncompatibleStoreError, match=r"is another store than .* delete that folder, or type another")
    with told, mirrored(served[1], tmp_path / "o"):
        pass
    assert len(other) == 0


def test_what_is_damaged_here_is_removed_and_fetched_again(
    store: ZarrStore, served: tuple[Proxy, str], tmp_path: Path
) -> None:
    with mirrored(served[1], tmp_path / "o") as (mirror, near):
        read_all(near)
        shards = mirror.folder / STORE / "shards"
        (shards / store.shard_names[0] / "entries-0" / "c" / "0" / "0").write_bytes(b"x")
        (shards / store.shard_names[1] / GROUP).write_bytes(b"x")
        (mirror.folder / "index" / "keys" / "c" / "0").write_bytes(b"x")
        assert mirror.mend() == [*store.shard_names[:2], "index"] and mirror.mend() == []
        read_all(ZarrStore(mirror, "again"))
        assert len(mirror._local.folders("shards")) == 3


@pytest.mark.parametrize("name", [GROUP, "vocabulary/bytes/c/0"])
def test_a_damaged_root_is_one_line_that_says_what_to_delete(
    served: tuple[Proxy, str], tmp_path: Path, name: str
) -> None:
    with mirrored(served[1], tmp_path / "o") as (mirror, _):
        path = mirror.folder / STORE / name
        path.write_bytes(path.read_bytes()[:-2] + b"xx")
    for remote in (True, False):
        with (
            closing(ServiceClient(served[1])) as client,
            pytest.raises(LogitstoreError, match=r"delete .*h?o") as caught,
        ):
            Mirror(HttpFiles(client, lists=True) if remote else None, mirror.folder, MOST)
        assert "\n" not in str(caught.value)


def test_over_its_budget_a_shard_is_fetched_again_when_it_is_read_again(
    store: ZarrStore, served: tuple[Proxy, str], tmp_path: Path
) -> None:
    one = max(sum(len(v) for k, v in contents(shard_folder(store, n)).items()) for n in range(3))
    with mirrored(served[1], tmp_path / "o", one + 3000) as (mirror, near):
        for _ in range(2):
            read_all(near)
            assert 1 <= len(mirror._local.folders("shards")) < 3
        assert mirror.trimmed >= 2
    told = pytest.raises(StoreWriteError, match=r"has [\d,]+ bytes, and the overlay may take 4,000; type --overlay-gb")
    with mirrored(served[1], tmp_path / "p", 4000) as (_, near), told:
        read_all(near)


def test_a_shard_that_another_process_has_trimmed_is_fetched_again(served: tuple[Proxy, str], tmp_path: Path) -> None:
    with mirrored(served[1], tmp_path / "o") as (mirror, near):
        for number in range(len(near)):
            near.record(number)
            shutil.rmtree(mirror.folder / STORE / "shards" / near.shard_names[number // 3], ignore_errors=True)


def test_a_shard_that_another_process_removes_while_it_is_checked_is_fetched_again(
    served: tuple[Proxy, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with mirrored(served[1], tmp_path / "o") as (mirror, near):
        gone = []

        def trimmed(_: Mirror, folder: str) -> list[str]:
            gone.append(remove(mirror.folder / STORE / folder))
            return LocalFiles(mirror.folder / STORE).names(folder)

        monkeypatch.setattr(Mirror, "names", trimmed)
        assert len(near.record(0).records) and gone == [True]


def test_a_full_disk_is_one_line_and_leaves_nothing(
    served: tuple[Proxy, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with mirrored(served[1], tmp_path / "o") as (mirror, near):

        def full(*_: object) -> str:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("logitstore.mirror._write", full)
        with pytest.raises(StoreWriteError, match="cannot be written: No space left on device; nothing that was"):
            near.record(0)
        assert nothing_half(mirror.folder)


READER = """
import sys
from pathlib import Path
from tests.test_mirror import mirrored

url, overlay, most_bytes, times, step = sys.argv[1:]
for _ in range(int(times)):
    with mirrored(url, Path(overlay), int(most_bytes)) as (_, near):
        for number in [*range(len(near))][:: int(step)] * 2:
            near.record(number)
"""


def reader(url: str, overlay: Path, most_bytes: int = MOST, times: int = 1, step: int = 1) -> "subprocess.Popen[str]":
    """A process that reads all of a store: not a forked one, which would have this one's threads' locks."""
    words = [sys.executable, "-W", "error", "-c", READER, url, overlay, most_bytes, times, step]
    return subprocess.Popen([str(word) for word in words], stderr=subprocess.PIPE, text=True)


def end_well(*readers: "subprocess.Popen[str]") -> None:
    assert [each.communicate(timeout=60)[1] for each in readers] == [""] * len(readers)


def test_a_killed_client_leaves_nothing_half_visible(served: tuple[Proxy, str], tmp_path: Path) -> None:
    proxy, url = served
    for number in (3, 9, 14, 20, 30):
        seen, reached = len(proxy.asked), threading.Event()

        def stop(_: str, seen: int = seen, number: int = number, reached: threading.Event = reached) -> Fault | None:
            if len(proxy.asked) - seen < number:
                return None
            reached.set()
            return Fault("stall")

        proxy.fault = stop
        child = reader(url, tmp_path / "o")
        killed = reached.wait(20 if number < 15 else 3)
        child.kill()
        child.communicate()
        assert killed or number > 14
        for left in (tmp_path / "o").glob("*/store"):
            assert verify(left, quiet=True).problems == []
    proxy.fault = lambda _: None
    end_well(reader(url, tmp_path / "o"))


def test_two_that_fetch_into_one_folder_do_not_disturb_each_other(
    store: ZarrStore, served: tuple[Proxy, str], tmp_path: Path
) -> None:
    end_well(*[reader(served[1], tmp_path / "o") for _ in range(3)])
    left = next((tmp_path / "o").glob("*/store"))
    assert verify(left, quiet=True).documents == len(store) and nothing_half(tmp_path / "o")


def test_two_that_take_away_what_the_other_reads_both_go_on(
    store: ZarrStore, served: tuple[Proxy, str], tmp_path: Path
) -> None:
    one = max(sum(len(v) for k, v in contents(shard_folder(store, n)).items()) for n in range(3))
    end_well(*[reader(served[1], tmp_path / "o", one + 4000, 4, step) for step in (1, -1, 1)])
    assert nothing_half(tmp_path / "o")


def test_an_index_that_another_process_takes_away_while_it_is_read_is_fetched_again(
    served: tuple[Proxy, str], tmp_path: Path
) -> None:
    with mirrored(served[1], tmp_path / "o") as (mirror, _):
        whole = mirror.mapped("index/keys/c/0").tobytes()
        shutil.rmtree(mirror.folder / "index")
        assert mirror.mapped("index/keys/c/0").tobytes() == whole


def test_after_the_first_that_fails_nothing_is_begun() -> None:
    begun: list[str] = []

    def fail(name: str) -> None:
        begun.append(name)
        raise ServiceError(name)

    with pytest.raises(ServiceError):
        together(fail, map(str, range(1000)))
    assert len(begun) < 20


@pytest.mark.parametrize("name", ["../../x", "/etc/x", "a/../../../x", "", ".", "a\0b", "shards"])
def test_a_service_that_names_other_places_writes_nothing_there(
    store: ZarrStore, served: tuple[Proxy, str], tmp_path: Path, name: str
) -> None:
    entry = json.loads((shard_folder(store) / GROUP).read_text())["attributes"]
    entry.pop("digest")
    entry["files"][name] = {"bytes": 2, "digest": "0" * 32}
    (shard_folder(store) / GROUP).write_bytes(seal_group(entry))
    before = {path for path in tmp_path.rglob("*") if "/o/" not in str(path)}
    with pytest.raises(LogitstoreError) as caught, mirrored(served[1], tmp_path / "o") as (_, near):
        read_all(near)
    assert "\n" not in str(caught.value)
    assert {path for path in tmp_path.rglob("*") if "/o/" not in str(path)} - before <= {tmp_path / "o"}


def test_an_index_of_shards_that_are_not_there_is_not_believed(
    store: ZarrStore, served: tuple[Proxy, str], tmp_path: Path
) -> None:
    import numpy as np

    from logitstore.index import EMPTY

    shutil.rmtree(store.folder / "index")
    (store.folder / "index").mkdir()
    names = [f"{number:016x}" for number in range(5000)]
    write_index(store.folder / "index", names, np.ones((5000, 2), np.int64), EMPTY, EMPTY, [])
    with pytest.raises(LogitstoreError, match="index") as caught, mirrored(served[1], tmp_path / "o") as (_, near):
        read_all(near)
    assert "\n" not in str(caught.value) and len(served[0].asked) < 100
