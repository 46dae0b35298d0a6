"""Object stores take a store file by file, and no reader finds a part before it is whole; S3 has a server."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import obstore
import pytest
import zarr

from logitstore.errors import CorruptStoreError, IncompatibleStoreError, StoreLostError, StoreWriteError
from logitstore.moved import Source
from logitstore.object_destination import ObjectDestination
from logitstore.places import push
from logitstore.remote_files import RemoteFiles
from logitstore.store import open_store
from logitstore.transfer import move
from logitstore.verify import verify
from logitstore.zarr_store import ZarrStore
from tests.stores import VOCABULARY, contents, manifest, records, small_store
from tests.test_parts import whole


def objects(files: RemoteFiles) -> dict[str, bytes]:
    return {name: bytes(obstore.get(files._store, name).bytes()) for name in files.sizes("")}


def sent(store: ZarrStore, files: RemoteFiles) -> Any:
    return move(Source(store.files, "s"), ObjectDestination(files, "memory:///"), quiet=True)


def test_an_object_store_holds_the_same_files_and_gives_them_back(tmp_path: Path) -> None:
    store, files = whole(tmp_path / "s"), RemoteFiles("memory:///")
    report = sent(store, files)
    assert objects(files) == contents(store.folder) and report.parts == 5
    assert sent(store, files).to_text("m") == "m: 0 parts moved, 0 bytes sent; 5 were there"
    from logitstore.folder_destination import FolderDestination

    with FolderDestination.opened(tmp_path / "t") as folder:
        move(Source(files, "memory:///"), folder, quiet=True)
    assert contents(tmp_path / "t") == contents(store.folder)


def test_an_index_is_made_for_a_store_that_has_none_and_stays_where_others_wrote(tmp_path: Path) -> None:
    store, other, files = small_store(tmp_path / "s"), small_store(tmp_path / "t", shards=1), RemoteFiles("memory:///")
    sent(store, files)
    assert "index" not in os.listdir(store.folder)  # noqa: PTH208
    assert len(ZarrStore(files, "memory:///")) == 6 and "index/zarr.json" in objects(files)
    other.write_documents(records([4], seed=7))
    assert "shards of others are there too" in sent(other, files).note
    assert len(ZarrStore(files, "memory:///")) == 7


def test_what_is_cut_between_two_files_goes_on_and_rotten_leftovers_are_sent_again(tmp_path: Path) -> None:
    store, files = small_store(tmp_path / "s"), RemoteFiles("memory:///")
    group, name = "vocabulary/bytes/c/0", f"shards/{store.shard_names[0]}/entries-0/c/0/0"
    for file in (group, name):
        data = (store.folder / file).read_bytes()
        obstore.put(files._store, file, data if file == group else data[:-1] + b"x")
    report = sent(store, files)
    assert objects(files)[name] == (store.folder / name).read_bytes()
    assert report.sent_bytes == sum(map(len, contents(store.folder).values())) - store.files.size(group)


def test_a_part_appears_with_its_last_object(tmp_path: Path) -> None:
    store, files = small_store(tmp_path / "s", shards=1), RemoteFiles("memory:///")
    order: list[str] = []
    put = files.put
    files.put = lambda name, *rest: (order.append(name), put(name, *rest))[1]  # type: ignore[method-assign]
    sent(store, files)
    shard = f"shards/{store.shard_names[0]}"
    ends = [order.index(name) for name in ("zarr.json", f"{shard}/zarr.json", "index/zarr.json")]
    assert ends == sorted(ends) and ends[2] == len(order) - 1
    assert all(order.index(f"{shard}/{file}") < ends[1] for file in store.shard(store.shard_names[0]).entry.files)


def test_a_store_without_documents_is_moved_too(tmp_path: Path) -> None:
    store, files = ZarrStore.create(tmp_path / "s", manifest(), VOCABULARY), RemoteFiles("memory:///")
    assert sent(store, files).parts == 1 and objects(files) == contents(store.folder)
    push(str(store.folder), str(tmp_path / "t"), quiet=True)
    assert contents(tmp_path / "t") == contents(store.folder)


def test_damage_in_an_object_store_is_not_passed_on(tmp_path: Path) -> None:
    store, files, to = small_store(tmp_path / "s"), RemoteFiles("memory:///"), RemoteFiles("memory:///")
    sent(store, files)
    name = f"shards/{store.shard_names[0]}/positions/c/0/0"
    obstore.put(files._store, name, objects(files)[name][:-1] + b"x")
    with pytest.raises(CorruptStoreError, match="positions/c/0/0: its bytes are not those"):
        move(Source(files, "memory:///"), ObjectDestination(to, "to"), quiet=True)
    assert not any(
        store.shard_names[0] in name and name.endswith(f"{store.shard_names[0]}/zarr.json") for name in objects(to)
    )
    obstore.delete(files._store, name)
    with pytest.raises(StoreLostError, match="answers no more"):
        move(Source(files, "memory:///"), ObjectDestination(to, "to"), quiet=True)


def test_another_store_in_the_bucket_is_refused(tmp_path: Path) -> None:
    files = RemoteFiles("memory:///")
    sent(ZarrStore.create(tmp_path / "t", manifest(seed=3), VOCABULARY), files)
    before = objects(files)
    with pytest.raises(IncompatibleStoreError, match="holds another store: its seed is 3"):
        sent(small_store(tmp_path / "s"), files)
    assert objects(files) == before


# ---- S3, by a server of its own --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """The URL of an S3-compatible server with a bucket."""
    if not all(map(find_spec, ("moto", "flask", "flask_cors"))):
        pytest.skip("moto's server is not installed: pip install 'moto[s3]' flask flask-cors")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-W", "ignore", "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            deadline = time.monotonic() + 60
            while True:
                try:
                    bucket = urllib.request.Request(f"http://127.0.0.1:{port}/bucket", method="PUT")
                    with urllib.request.urlopen(bucket):
                        break
                except OSError:
                    assert server.poll() is None and time.monotonic() < deadline
                    time.sleep(0.1)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()


@pytest.fixture
def bucket(s3: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Its URL; who it is told in the environment, as for any tool."""
    for name, value in (
        ("AWS_ENDPOINT", s3),
        ("AWS_ALLOW_HTTP", "true"),
        ("AWS_ACCESS_KEY_ID", "a"),
        ("AWS_SECRET_ACCESS_KEY", "b"),
        ("AWS_REGION", "us-east-1"),
    ):
        monkeypatch.setenv(name, value)
    return "s3://bucket"


def test_a_store_goes_to_s3_and_back(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("logitstore.remote_files.PART_BYTES", 5 << 20)  # the least that S3 takes
    made = manifest(hidden_layers=(0,), hidden_size=16384)
    store = ZarrStore.create(tmp_path / "s", made, VOCABULARY)
    store.write_documents(records([400, 30], recipe=made.recipe))
    assert max(map(len, contents(store.folder).values())) > 5 << 20  # so one file goes in several requests
    store.save_index()
    push(str(store.folder), f"{bucket}/a/s", quiet=True)
    push(f"{bucket}/a/s", str(tmp_path / "t"), quiet=True)
    assert contents(tmp_path / "t") == contents(store.folder) and verify(tmp_path / "t", quiet=True).problems == []
    assert push(str(store.folder), f"{bucket}/a/s", quiet=True).parts == 0
    push(f"{bucket}/a/s", f"{bucket}/b", quiet=True)  # from bucket to bucket
    assert open_store(f"{bucket}/b").document(1)[0].tolist() == store.document(1)[0].tolist()


def test_plain_zarr_reads_a_store_in_s3(bucket: str, tmp_path: Path) -> None:
    store = small_store(tmp_path / "s")
    push(str(store.folder), f"{bucket}/plain", quiet=True)
    from obstore.store import from_url
    from zarr.storage import ObjectStore

    group = zarr.open_group(ObjectStore(from_url(f"{bucket}/plain", client_options={"allow_http": True})), mode="r")
    name = store.shard_names[0]
    assert np.array_equal(group[f"shards/{name}/documents"][:], store.shard(name).documents)


def test_a_bucket_that_is_not_there_is_one_line(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("logitstore.remote_files.RETRIES", 1)
    with pytest.raises(StoreWriteError, match=r"s3://none/x cannot be used .*type the same command again") as caught:
        push(str(small_store(tmp_path / "s").folder), f"{bucket.replace('bucket', 'none')}/x", quiet=True)
    assert "\n" not in str(caught.value)
