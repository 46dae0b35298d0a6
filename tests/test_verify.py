"""Damage of any kind is named by `verify`, and never read as numbers."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from logitstore.errors import StoreError, StoreFormatError, StoreNotFoundError
from logitstore.manifest import Manifest
from logitstore.sealed import GROUP, file_entries, seal_group
from logitstore.store import open_store
from logitstore.verify import to_json, verify
from tests.stores import contents, records, small_store, tokens
from tests.test_zarr_store import reseal

LENGTHS = (7, 2, 30)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return small_store(tmp_path / "s", shards=2, lengths=LENGTHS).path


def bad_files(path: Path) -> set[str]:
    return {problem.file for problem in verify(path, quiet=True).problems}


def read_by_number(path: Path) -> None:
    store = open_store(path)
    for number in range(len(store)):
        store.document(number)


def read_by_key(path: Path) -> None:
    store = open_store(path)
    for seed in range(2):
        for i, length in enumerate(LENGTHS):
            assert store.get(tokens(100 * seed + i, length)) is not None


def assert_noticed(path: Path, name: str) -> None:
    assert name in bad_files(path)
    for read in (read_by_number, read_by_key):
        with pytest.raises(StoreError) as caught:
            read(path)
        assert "\n" not in str(caught.value)


def test_a_store_as_it_was_written_is_good(store: Path) -> None:
    report = verify(store, quiet=True)
    assert (report.files, report.documents, report.positions, report.problems) == (len(contents(store)), 6, 72, [])
    assert to_json(report) == {"ok": True, "files": report.files, "documents": 6, "positions": 72, "problems": []}
    read_by_number(store)
    read_by_key(store)
    assert open_store(store).vocabulary


def test_one_flipped_byte_anywhere_is_named_and_never_read(store: Path) -> None:
    rng = np.random.default_rng(0)
    for name, data in contents(store).items():
        for at in {0, len(data) // 2, len(data) - 1, *rng.integers(0, len(data), 2).tolist()}:
            flipped = bytearray(data)
            flipped[at] ^= 1 << int(rng.integers(8))
            (store / name).write_bytes(flipped)
            assert bad_files(store) == {name}, (name, at)
            for read in (read_by_number, read_by_key):
                with pytest.raises(StoreError):
                    read(store)
        (store / name).write_bytes(data)
    assert verify(store, quiet=True).problems == []


@pytest.mark.parametrize("damage", ["emptied", "deleted", "one byte shorter", "one byte longer"])
def test_a_file_that_was_cut_grown_or_lost_is_named_and_never_read(store: Path, damage: str) -> None:
    for name, data in contents(store).items():
        if damage == "deleted":
            (store / name).unlink()
        else:
            (store / name).write_bytes(
                {"e": b"", "s": data[:-1], "l": data + b"\0"}[damage.removeprefix("one byte ")[0]]
            )
        assert_noticed(store, name)
        (store / name).write_bytes(data)


@pytest.mark.parametrize("array", ["records", "keys", "token_ids"])
def test_two_shards_with_an_array_swapped_are_both_named(store: Path, array: str) -> None:
    first, second = sorted((store / "shards").glob("*/"))
    (first / array).rename(store / "kept")
    (second / array).rename(first / array)
    (store / "kept").rename(second / array)
    named = {Path(name).parts[1] for name in bad_files(store)}
    assert named == {first.name, second.name}
    with pytest.raises(StoreError):
        read_by_number(store)


def test_what_is_not_part_of_the_store_is_named_and_what_is_being_written_is_not(store: Path) -> None:
    shard = next((store / "shards").glob("*/"))
    strays = {"x", "shards/x", f"shards/{shard.name}/x", f"shards/{shard.name}/records/c/1/0", "vocabulary/x"}
    hidden = {".journal-build", "shards/.partial-build/keys/zarr.json", ".DS_Store"}
    for name in strays | hidden:
        (store / name).parent.mkdir(parents=True, exist_ok=True)
        (store / name).touch()
    assert bad_files(store) == strays


def test_every_bad_file_is_named_not_only_the_first(store: Path) -> None:
    names = [name for name in contents(store) if name.endswith("c/0") or name == GROUP]
    for name in names:
        (store / name).write_bytes(b"x")
    assert bad_files(store) >= {name for name in names if not name.startswith("vocabulary")} and len(names) > 4


def rewrite(shard: Path, change: Callable[[dict[str, np.ndarray]], None]) -> None:
    """Damage a shard as its builder might: values changed, digests right."""
    import zarr

    arrays = {name: zarr.open_array(shard / name, mode="r+") for name in ("keys", "ends", "token_ids", "records")}
    values = {name: array[:] for name, array in arrays.items()}
    change(values)
    for name, array in arrays.items():
        array[:] = values[name]
    reseal(shard / GROUP, files=file_entries(shard))


@pytest.mark.parametrize(
    ("array", "rows", "value", "fault"),
    [
        ("keys", 0, 7, "the key of document 0 is not the hash of its tokens"),
        ("keys", 0, 7, "the shard's name is not the hash of its keys"),
        ("token_ids", 8, 5, "the key of document 1 is not the hash of its tokens"),
        ("token_ids", 8, 2**31, "token 2147483648 of 300"),
        ("ends", 0, 8, "the documents' lengths are not those of the tokens"),
        ("ends", 2, 2**63, "the documents' lengths are not those of the tokens"),
        ("records", 0, 255, "document 0 does not decode"),
    ],
)
def test_a_builders_own_mistake_is_found_where_every_digest_is_right(
    store: Path, array: str, rows: int, value: int, fault: str
) -> None:
    shard = next((store / "shards").glob("*/"))
    rewrite(shard, lambda values: values[array].__setitem__(rows, value))
    faults = [p.fault for p in verify(store, quiet=True).problems]
    assert any(found.startswith(fault) for found in faults)


@pytest.mark.parametrize(
    "changes",
    [
        {"documents": None},
        {"documents": True},
        {"documents": 10**30},
        {"positions": 1.5},
        {"fingerprint": 3},
        {"fingerprint": "e" * 32},
        {"files": [1]},
        {"files": {}},
        {"files": {"keys\0": {"bytes": 1, "digest": ""}}},
        {"files": {"x" * 5_000: {"bytes": 1, "digest": ""}}},
        {"extra": 1},
    ],
)
def test_a_sealed_entry_of_nonsense_is_named_and_verify_goes_on(store: Path, changes: dict[str, object]) -> None:
    bad = min((store / "shards").glob("*/"))
    reseal(bad / GROUP, **changes)
    report = verify(store, quiet=True)
    assert report.problems and all(p.file.startswith(f"shards/{bad.name}/") for p in report.problems)
    assert report.documents >= 3
    with pytest.raises(StoreError):
        read_by_number(store)


@pytest.mark.parametrize("zarr_json", [b"", b"{}", b'{"zarr_format": 3, "node_type": "array"}', b"\xff\xfe", b"3"])
def test_an_array_of_nonsense_under_a_right_digest_is_named(store: Path, zarr_json: bytes) -> None:
    shard = next((store / "shards").glob("*/"))
    (shard / "records" / GROUP).write_bytes(zarr_json)
    reseal(shard / GROUP, files=file_entries(shard))
    assert_noticed(store, f"shards/{shard.name}/{GROUP}")


def test_a_lost_folder_of_shards_and_an_empty_shard_are_named(store: Path) -> None:
    (store / "shards" / "empty").mkdir()
    assert_noticed(store, f"shards/empty/{GROUP}")
    shutil.rmtree(store / "shards")
    assert bad_files(store) == {f"shards/{GROUP}"}
    with pytest.raises(StoreError, match=r"shards/zarr\.json"):
        open_store(store)


def test_the_shards_are_looked_at_even_where_the_root_is_damaged(store: Path) -> None:
    shard = next((store / "shards").glob("*/"))
    (store / GROUP).write_bytes(b"")
    (shard / "keys" / "c" / "0" / "0").write_bytes(b"")
    assert bad_files(store) == {GROUP, f"shards/{shard.name}/keys/c/0/0"}


def test_weights_of_any_selection_are_those_of_a_distribution(tmp_path: Path) -> None:
    from logitstore.zarr_store import ZarrStore
    from tests.stores import VOCABULARY, manifest

    for select in ("threshold:1", "threshold:300", "top-k:1", "top-k:300"):
        made: Manifest = manifest(select)
        store = ZarrStore.create(tmp_path / select, made, VOCABULARY)
        store.write_shard(records([20, 3], recipe=made.recipe))
        assert verify(store.path, quiet=True).problems == []


def test_there_must_be_a_store_to_verify(tmp_path: Path) -> None:
    with pytest.raises(StoreNotFoundError):
        verify(tmp_path / "none")
    with pytest.raises(StoreFormatError):
        verify(tmp_path)
    (tmp_path / GROUP).write_bytes(seal_group({"logitstore": "nonsense"}))
    with pytest.raises(StoreFormatError):
        verify(tmp_path)


def test_the_report_as_json_names_the_file_and_the_fault(store: Path) -> None:
    (store / "vocabulary" / "lengths" / GROUP).unlink()
    (problem,) = json.loads(json.dumps(to_json(verify(store, quiet=True))))["problems"]
    assert problem["file"] == "vocabulary/lengths/zarr.json" and "No such file" in problem["fault"]
