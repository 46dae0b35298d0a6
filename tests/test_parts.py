"""A store is the sum of its parts; a part says what it may, inside its folder, of a size that it can have."""

from pathlib import Path
from typing import Any

import pytest

from logitstore.errors import CorruptStoreError, IncompatibleStoreError, StoreFormatError
from logitstore.fidelity import Fidelity
from logitstore.files import LocalFiles
from logitstore.parts import Part, is_part_name, part_names, part_of, parts_of, root_part
from logitstore.saved_maps import save_vocabulary_map
from logitstore.sealed import GROUP, seal_group, unseal_group
from logitstore.vocabulary_map import map_vocabularies
from logitstore.zarr_store import ZarrStore
from tests.stores import VOCABULARY, manifest, small_store


def whole(path: Path) -> ZarrStore:
    """A store with one of everything."""
    store = small_store(path)
    store.save_index()
    store.save_fidelity(Fidelity(8, 0.1, 0.2, 0.9, 1e-7, ((4, 3.0), (8, 2.0))).to_json())
    save_vocabulary_map(store, map_vocabularies(VOCABULARY, VOCABULARY))
    return store


def every_part(store: ZarrStore) -> list[Part]:
    root, made = root_part((store.folder / GROUP).read_bytes(), "s")
    return [root, *parts_of(store.files, part_names(store.files, "s"), made, "s")]


def test_parts_are_all_of_a_store_but_its_index(tmp_path: Path) -> None:
    store = whole(tmp_path / "s")
    parts = every_part(store)
    assert [part.name for part in parts] == [
        "root", *sorted(store.shard_names), f"map-{VOCABULARY.fingerprint()}", "fidelity"
    ]  # fmt: skip
    assert all(is_part_name(part.name) for part in parts) and not is_part_name("index")
    files = [part.path(file) for part in parts for file in (GROUP, *part.files)]
    assert sorted(files) == [name for name in store.files.names() if not name.startswith("index/")]
    assert sum(part.total_bytes for part in parts) == sum(map(store.files.size, files))


def test_shards_are_told_by_the_index_where_nothing_is_listed(tmp_path: Path) -> None:
    from logitstore.remote_files import RemoteFiles

    store = whole(tmp_path / "s")

    class Unlisted(RemoteFiles):
        def __init__(self) -> None:
            super().__init__(f"file://{store.folder}")
            self._lists = False

    assert part_names(Unlisted(), "s") == [*sorted(store.shard_names), "fidelity"]
    (store.folder / "index" / "shards" / "c" / "0" / "0").write_bytes(b"x")
    with pytest.raises(CorruptStoreError, match="shards/c/0/0: holds 1 bytes instead of"):
        part_names(Unlisted(), "s")


HOSTILE: dict[str, tuple[str, Any, str]] = {
    "outside": ("../x", 1, "says what no logitstore writes"),
    "absolute": ("/etc/x", 1, "says what no logitstore writes"),
    "hidden": ("a/.lock", 1, "names a file 'a/.lock'"),
    "itself": (GROUP, 1, "names a file 'zarr.json'"),
    "another spelling": ("a//b", 1, "names a file 'a//b'"),
    "a drive": ("c:x", 1, "names a file 'c:x'"),
    "less than nothing": ("x", -1, "names a file 'x'"),
    "a truth": ("x", True, "names a file 'x'"),
    "within a file": ("blocks/c/0/x", 1, "within a file"),
    "too much": ("x", 1 << 40, "are the most that there can be"),
}


@pytest.mark.parametrize("lie", HOSTILE)
def test_a_shard_that_names_what_it_may_not_is_refused(tmp_path: Path, lie: str) -> None:
    store = small_store(tmp_path / "s", lengths=(7, 200))
    name = store.shard_names[0]
    said = unseal_group((store.folder / "shards" / name / GROUP).read_bytes(), "s")
    file, size, message = HOSTILE[lie]
    said["files"][file] = {"bytes": size, "digest": "0" * 32}
    with pytest.raises(CorruptStoreError, match=message) as caught:
        part_of(name, seal_group(said), store.manifest, "s")
    assert "\n" not in str(caught.value)


def test_a_root_that_names_files_of_shards_is_refused(tmp_path: Path) -> None:
    store = small_store(tmp_path / "s")
    said = unseal_group((store.folder / GROUP).read_bytes(), "s")
    said["files"]["index/zarr.json"] = {"bytes": 1, "digest": "0" * 32}
    with pytest.raises(CorruptStoreError, match="names files that are none of a root"):
        root_part(seal_group(said), "s")
    said = unseal_group((store.folder / GROUP).read_bytes(), "s")
    said["logitstore"]["format_version"] = 2
    with pytest.raises(StoreFormatError, match="format"):
        root_part(seal_group(said), "s")


def test_another_stores_shard_and_another_tokenizers_map_are_refused(tmp_path: Path) -> None:
    store = whole(tmp_path / "s")
    for part in every_part(store)[1:-1]:
        with pytest.raises(IncompatibleStoreError, match=r"belongs to .*, expected .*; move that folder"):
            other = manifest(seed=1) if part.folder.startswith("shards/") else store.manifest
            part_of(part.name if other is not store.manifest else "map-" + "0" * 32, part.group, other, "s")


def test_the_largest_shard_that_can_be_written_is_within_its_bound(tmp_path: Path) -> None:
    for select in ("top-k:50", "random:20", "threshold:4"):
        store = ZarrStore.create(tmp_path / select, manifest(select), VOCABULARY)
        from tests.stores import records

        store.write_documents(records([2, 2, 300], recipe=store.manifest.recipe))
        assert [part.name for part in every_part(store)][1:] == store.shard_names
    assert LocalFiles(tmp_path).names()
