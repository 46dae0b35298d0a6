"""A store whose checksums are right and which says what no logitstore writes is refused in one line, at small cost."""

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import lmdb
import numpy as np
import pytest

from logitstore.errors import ConfigError, CorruptStoreError, StoreError, StoreFormatError
from logitstore.info import info, to_text
from logitstore.lmdb_records import BUNDLE, PLACE
from logitstore.lmdb_store import LmdbStore
from logitstore.sealed import GROUP
from logitstore.selection import Selection
from logitstore.store import open_store
from logitstore.verify import verify
from logitstore.zarr_store import ZarrStore
from tests import hostile
from tests.hostile import Program, edited_record, golden_lmdb, move_places, read_all
from tests.stores import manifest, small_store
from tests.test_zarr_store import reseal


@pytest.fixture
def store(tmp_path: Path) -> ZarrStore:
    made = small_store(tmp_path / "s", shards=1)
    made.save_index()
    return made


def says(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Change what the root says of teacher, tokenizer and recipe."""

    def reseal_root(folder: Path) -> None:
        told = manifest().to_json()
        change(told)
        reseal(folder / GROUP, logitstore=told)

    return reseal_root


NONSENSE: dict[str, Callable[[Path], None]] = {
    "a version of two lines": says(lambda told: told.update(format_version="a\nb")),
    "a size in words": says(lambda told: told["tokenizer"].update(size="300")),
    "a size beyond memory": says(lambda told: told["tokenizer"].update(size=1 << 31)),
    "a width that is no number": says(lambda told: told["recipe"].update(vocab_size=300.0)),
    "a seed beyond 64 bits": says(lambda told: told["recipe"].update(seed=1 << 64)),
    "a temperature beyond floats": says(lambda told: told["recipe"].update(temperatures=[10**400])),
    "a thousand temperatures": says(lambda told: told["recipe"].update(temperatures=[1.0 + i for i in range(1000)])),
    "a thousand log Z": says(lambda told: told["recipe"].update(log_z=[1.0 + i for i in range(1000)])),
    "a name of another kind": says(lambda told: told["teacher"].update(name=[])),
    "a flag of two lines": says(lambda told: told["recipe"].update({"a\nb": 1})),
    "a special id without end": lambda folder: reseal(folder / GROUP, special_ids=[float("inf")]),
    "an end that is no id": lambda folder: reseal(folder / GROUP, eos_id="</s>"),
    "a file of two lines": lambda folder: reseal(folder / GROUP, files={"a\nb": {"bytes": 1, "digest": ""}}),
}


@pytest.mark.parametrize("nonsense", NONSENSE)
def test_a_root_of_nonsense_is_refused_in_one_line(store: ZarrStore, nonsense: str) -> None:
    NONSENSE[nonsense](store.folder)
    with pytest.raises((StoreFormatError, CorruptStoreError)) as caught:
        open_store(store.folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("counts", [{"positions": 1 << 40}, {"documents": 1 << 20, "positions": 1 << 27}])
def test_a_shard_that_would_unpack_to_more_than_it_can_hold_is_refused(
    store: ZarrStore, counts: dict[str, int]
) -> None:
    shard = store.folder / "shards" / store.shard_names[0]
    reseal(shard / GROUP, **counts)
    with pytest.raises(CorruptStoreError, match=r"says what no logitstore writes|fewer bytes than documents"):
        _ = open_store(store.folder).shard(store.shard_names[0]).documents  # type: ignore[attr-defined]


def test_more_entries_than_memory_holds_are_refused() -> None:
    with pytest.raises(ConfigError, match="expected at most 1048576; type fewer"):
        Selection.parse("top-k:99999999")


def test_a_fidelity_of_nonsense_is_told_as_such(store: ZarrStore) -> None:
    store.save_fidelity({"head_l1": "much", "angles": []})
    assert "says what no logitstore writes" in to_text(info(store), store.path)


def test_a_stray_file_among_the_shards_is_counted_and_does_no_harm(store: ZarrStore) -> None:
    (store.folder / "shards" / "x").write_bytes(b"12")
    assert store.plane_bytes()["shards"] == 2


def test_a_zip_file_with_a_member_without_a_name_is_no_store(tmp_path: Path) -> None:
    path = tmp_path / "s.zip"
    with ZipFile(path, "w") as archive:
        archive.writestr("x", b"1")
    data = path.read_bytes()
    at = data.index(b"PK\1\2")
    path.write_bytes(data[: at + 28] + struct.pack("<H", 0) + data[at + 30 : at + 46] + data[at + 47 :])
    with pytest.raises(StoreError) as caught:
        open_store(path)
    assert "\n" not in str(caught.value)


def test_a_record_that_ends_too_early_under_right_checksums_is_named_by_every_reader(tmp_path: Path) -> None:
    path = tmp_path / "s.lmdb"
    path.write_bytes(golden_lmdb("threshold:4"))
    with lmdb.open(str(path), subdir=False, lock=False, map_size=1 << 20) as env, env.begin(write=True) as txn:
        key = BUNDLE + bytes(4)
        before = bytes(txn.get(key))
        data = edited_record(
            before, Program(bytes([1, 7, 3, 0, 1])), 2
        )  # what is beside the entries, cut after 3 bytes
        txn.put(key, data)
        move_places(txn, key, len(data) - len(before))
    read_all(lambda: LmdbStore(path), lambda: verify(path, quiet=True))


def test_hidden_states_of_nonsense_do_no_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = {"hidden_layers": (1, 0), "hidden_size": 20}
    monkeypatch.setattr(hostile, "RECIPES", {"top-k:4": kept})  # a name of its own: stores are cached by it
    rng = np.random.default_rng(0)
    for place in (0, 1, 3):  # folder, folder without an index, lmdb
        for _ in range(12):
            hostile.try_to_harm(bytes([0, place]) + rng.bytes(40), tmp_path)
    names = sorted(hostile.golden("top-k:4"))
    for number in [i for i, name in enumerate(names) if "hidden-" in name]:
        for _ in range(4):
            hostile.try_to_harm(bytes([0, 0, number]) + rng.bytes(40), tmp_path)


HIDDEN_NONSENSE: dict[str, dict[str, object]] = {
    "a layer in words": {"hidden_layers": ["6"], "hidden_size": 20},
    "layers without a width": {"hidden_layers": [6]},
    "a width without layers": {"hidden_size": 20},
    "a width beyond any model": {"hidden_layers": [6], "hidden_size": 1 << 40},
    "a width below none": {"hidden_layers": [6], "hidden_size": -20},
    "a width that is a flag": {"hidden_layers": [6], "hidden_size": True},
    "a thousand layers": {"hidden_layers": list(range(1000)), "hidden_size": 20},
    "a layer beyond any model": {"hidden_layers": [1 << 70], "hidden_size": 20},
    "one layer twice": {"hidden_layers": [6, 6], "hidden_size": 20},
}


@pytest.mark.parametrize("nonsense", HIDDEN_NONSENSE)
def test_hidden_layers_of_nonsense_are_refused_in_one_line(store: ZarrStore, nonsense: str) -> None:
    says(lambda told: told["recipe"].update(HIDDEN_NONSENSE[nonsense]))(store.folder)
    with pytest.raises(StoreFormatError) as caught:
        open_store(store.folder)
    assert "\n" not in str(caught.value)


def test_a_store_that_says_it_has_hidden_states_and_has_none_is_damaged(store: ZarrStore) -> None:
    says(lambda told: told["recipe"].update(hidden_layers=[0], hidden_size=65_536))(store.folder)
    report = verify(store.folder, quiet=True)
    assert report.problems  # its shards were built as part of another store
    with pytest.raises(StoreError):
        open_store(store.folder).document(0)


def test_a_place_that_is_gone_is_damage(tmp_path: Path) -> None:
    path = tmp_path / "s.lmdb"
    path.write_bytes(golden_lmdb("threshold:4"))
    with lmdb.open(str(path), subdir=False, lock=False, map_size=1 << 20) as env, env.begin(write=True) as txn:
        txn.delete(PLACE + bytes(4))
    with pytest.raises(CorruptStoreError):
        LmdbStore(path).digest()
