"""What is read over HTTP is kept while there is room, asked for again when it is to be, and bounded."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from logitstore.files import CannotList
from logitstore.http_files import HttpFiles
from logitstore.service_client import ServiceClient
from logitstore.store import open_store
from logitstore.zarr_store import ZarrStore
from tests.faulty_proxy import Proxy, proxied
from tests.served import serving
from tests.stores import shard_folder, small_store


@pytest.fixture
def store(tmp_path: Path) -> ZarrStore:
    made = small_store(tmp_path / "s.zarr", 3)
    made.save_index()
    return made


@pytest.fixture
def near(store: ZarrStore) -> Iterator[tuple[Proxy, HttpFiles]]:
    with serving(store.folder) as url, proxied(url) as (proxy, far), closing(ServiceClient(f"{far}/s")) as client:
        yield proxy, HttpFiles(client, lists=True)


def file_of(store: ZarrStore, number: int = 0) -> str:
    return f"shards/{store.shard_names[number]}/documents/c/0/0"


def test_parts_and_sizes_are_those_of_the_file(store: ZarrStore, near: tuple[Proxy, HttpFiles]) -> None:
    for name in (file_of(store), "zarr.json", "index/keys/c/0"):
        data = (store.folder / name).read_bytes()
        assert (near[1].read(name), near[1].read(name, 5), near[1].read(name, 5, 9)) == (data, data[5:], data[5:9])
        assert near[1].read(name, 10**6) == near[1].read(name, 9, 5) == b"" and near[1].size(name) == len(data)
        assert bytes(near[1].mapped(name)) == data
    for question in (near[1].read, near[1].size):
        with pytest.raises(FileNotFoundError):
            question("shards/0011223344556677/zarr.json")


def test_what_is_written_once_is_asked_for_once(store: ZarrStore, near: tuple[Proxy, HttpFiles]) -> None:
    for _ in range(3):
        near[1].size(file_of(store))
        near[1].read(file_of(store))
        near[1].read("index/zarr.json")
    assert len(near[0].of("/documents/")) == 1 and len(near[0].of("/index/")) == 3


def test_what_is_forgotten_is_asked_for_again(store: ZarrStore, near: tuple[Proxy, HttpFiles]) -> None:
    for number in (0, 1):
        near[1].read(file_of(store, number))
    near[1].forget(f"shards/{store.shard_names[0]}")
    assert not near[1].keeps(file_of(store)) and near[1].keeps(file_of(store, 1))
    assert near[1].read(file_of(store)) == (shard_folder(store) / "documents" / "c" / "0" / "0").read_bytes()
    assert len(near[0].of("/documents/")) == 3


def test_no_more_is_kept_than_there_is_room_for(
    store: ZarrStore, near: tuple[Proxy, HttpFiles], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("logitstore.file_cache.MOST_BYTES", 2500)
    names = [f"shards/{shard}/zarr.json" for shard in store.shard_names]
    for name in [*names, *names]:
        assert near[1].read(name) == (store.folder / name).read_bytes()
        assert near[1]._kept.size_bytes == sum(map(len, near[1]._kept._kept.values())) <= 2500
    assert 1 <= sum(map(near[1].keeps, names)) < 3


def test_a_file_that_is_too_long_to_be_what_it_should_is_not_read_to_its_end(
    store: ZarrStore, near: tuple[Proxy, HttpFiles], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("logitstore.http_files.MOST_JSON_BYTES", 99)
    monkeypatch.setattr("logitstore.http_files.MOST_FILE_BYTES", 30)
    assert len(near[1].read("zarr.json")) == 100 and len(near[1].read(file_of(store))) == 30


def test_only_shards_are_listed_and_only_by_a_service(store: ZarrStore, near: tuple[Proxy, HttpFiles]) -> None:
    assert near[1].folders("shards") == set(store.shard_names)
    plain = HttpFiles(near[1].client, lists=False)
    for question in (near[1].names, lambda: near[1].folders(""), lambda: plain.folders("shards")):
        with pytest.raises(CannotList, match="cannot be listed"):
            question()


def test_its_planes_are_those_of_the_folder(store: ZarrStore, near: tuple[Proxy, HttpFiles]) -> None:
    found = open_store(near[1].client.url)
    mine, own = found.plane_bytes(), store.plane_bytes()
    assert {name: size for name, size in mine.items() if name != "metadata"} == {
        name: size for name, size in own.items() if name != "metadata"
    }
    assert mine["metadata"] <= own["metadata"] and not near[0].of("HEAD /s/shards")
