"""A store keeps the map to a student's vocabulary: whole, checked, by its fingerprint, and no part of what it says."""

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import zarr

from logitstore.errors import CorruptStoreError, IncompatibleStoreError, StoreWriteError
from logitstore.gc import gc
from logitstore.merge import convert, merge
from logitstore.repair import repair
from logitstore.saved_maps import (
    KeptMap,
    map_folders,
    save_vocabulary_map,
    saved_vocabulary_map,
    vocabulary_map_of,
)
from logitstore.sealed import GROUP
from logitstore.store import open_store
from logitstore.verify import verify
from logitstore.vocabulary import Vocabulary
from logitstore.vocabulary_map import VocabularyMap, map_vocabularies
from logitstore.zarr_store import MAP_PREFIX, ZarrStore
from tests.stores import VOCABULARY, contents, records, small_store
from tests.stubs import flip
from tests.test_files import FolderHandler, served
from tests.test_zarr_store import reseal

STUDENT = Vocabulary(
    (b"<", b">", *(b"%d" % i for i in range(10)), *VOCABULARY.tokens[150:250]), frozenset(), None, None
)
OTHER = Vocabulary((b"x", b"<7>"), frozenset(), None, None)
FOLDER = MAP_PREFIX + STUDENT.fingerprint()


@pytest.fixture
def store(tmp_path: Path) -> ZarrStore:
    return small_store(tmp_path / "s.zarr")


def equal(one: VocabularyMap | None, other: VocabularyMap) -> bool:
    return one is not None and all(np.array_equal(getattr(one, f), getattr(other, f)) for f in vars(other))


MAP = map_vocabularies(VOCABULARY, STUDENT)


def test_a_map_is_read_as_it_was_saved_and_computed_once(store: ZarrStore, monkeypatch: pytest.MonkeyPatch) -> None:
    assert saved_vocabulary_map(store, STUDENT.fingerprint()) is None
    first = vocabulary_map_of(store, STUDENT)
    assert first.computed and not first.not_kept and equal(first.vocabulary_map, MAP)
    assert {array.dtype for array in (MAP.student_ids, MAP.link_lengths, MAP.link_ids)} == {np.dtype(np.int32)}
    assert len(MAP.link_ids) > 100 and (MAP.student_ids >= 0).sum() == 100
    monkeypatch.setattr("logitstore.saved_maps.map_vocabularies", lambda *_: pytest.fail("computed again"))
    again = vocabulary_map_of(open_store(store.path), STUDENT)
    assert equal(again.vocabulary_map, MAP) and not again.computed


def test_a_map_of_tokenizers_without_a_token_in_common_or_without_links_is_kept_too(store: ZarrStore) -> None:
    for student in (OTHER, Vocabulary((b"x",), frozenset(), None, None), VOCABULARY):
        made = vocabulary_map_of(store, student)
        assert equal(saved_vocabulary_map(store, student.fingerprint()), made.vocabulary_map)
    assert len(map_folders(store.files)) == 3 and not verify(store.folder, quiet=True).problems


def test_a_map_changes_nothing_that_the_store_says(store: ZarrStore) -> None:
    before, digest = contents(store.folder), store.digest()
    save_vocabulary_map(store, MAP)
    opened = open_store(store.path)
    assert (opened.digest(), opened.manifest.fingerprint) == (digest, store.manifest.fingerprint)
    assert {n: d for n, d in contents(store.folder).items() if not n.startswith(FOLDER)} == before
    assert verify(store.folder, quiet=True).problems == [] and opened.plane_bytes()["vocabulary-maps"] > 0
    assert gc(store.folder).removed == [] and f"{FOLDER}/{GROUP}" in contents(store.folder)
    repair(store.folder, None, quiet=True)
    assert equal(saved_vocabulary_map(store, STUDENT.fingerprint()), MAP)


def test_saved_again_it_stays_and_the_same_map_has_the_same_bytes(store: ZarrStore, tmp_path: Path) -> None:
    save_vocabulary_map(store, MAP)
    before = contents(store.folder)
    written = (store.folder / FOLDER / GROUP).stat().st_mtime_ns
    save_vocabulary_map(store, MAP)
    assert contents(store.folder) == before and (store.folder / FOLDER / GROUP).stat().st_mtime_ns == written
    other = small_store(tmp_path / "o.zarr")
    save_vocabulary_map(other, MAP)
    assert contents(other.folder) == before


def test_zarr_reads_its_arrays(store: ZarrStore) -> None:
    save_vocabulary_map(store, MAP)
    group = zarr.open_group(str(store.folder / FOLDER), mode="r")
    ids = np.ascontiguousarray(np.asarray(group["ids"]).T).view("<i4").ravel()
    np.testing.assert_array_equal(ids, MAP.student_ids)


def test_what_a_killed_command_left_goes_with_the_next(store: ZarrStore) -> None:
    for name in (".partial-map-1", ".partial-old-map-1"):
        (store.folder / name).mkdir()
        (store.folder / name / GROUP).write_text("{")
    assert gc(store.folder, dry_run=True).removed[0].path.name == ".partial-map-1"
    save_vocabulary_map(store, MAP)
    assert not list(store.folder.glob(".partial-*"))


def test_a_map_of_other_tokenizers_is_refused_by_name(store: ZarrStore) -> None:
    save_vocabulary_map(store, MAP)
    shutil.copytree(store.folder / FOLDER, store.folder / (MAP_PREFIX + OTHER.fingerprint()))
    for read in (saved_vocabulary_map, lambda store, _: vocabulary_map_of(store, OTHER)):
        with pytest.raises(
            IncompatibleStoreError, match=f"to {STUDENT.fingerprint()}, expected .* {OTHER.fingerprint()}"
        ):
            read(store, OTHER.fingerprint())
    reseal(store.folder / FOLDER / GROUP, teacher="0" * 32)
    with pytest.raises(
        IncompatibleStoreError, match=f"maps tokenizer 0{{32}} to .*, expected {VOCABULARY.fingerprint()}"
    ):
        saved_vocabulary_map(store, STUDENT.fingerprint())
    named = {problem.file for problem in verify(store.folder, quiet=True).problems}
    assert named == {f"{MAP_PREFIX}{v.fingerprint()}/{GROUP}" for v in (STUDENT, OTHER)}
    with pytest.raises(IncompatibleStoreError, match="the map is one of tokenizer 1"):
        save_vocabulary_map(store, replace(MAP, teacher_fingerprint="1" * 32))


def test_any_damaged_byte_is_refused_and_named_and_repair_takes_it_away(store: ZarrStore) -> None:
    save_vocabulary_map(store, MAP)
    files = {name: data for name, data in contents(store.folder).items() if name.startswith(FOLDER)}
    assert len(files) == 7
    for name in files:
        for at in (0, 0.5, 0.999):
            flip(store.folder / name, at)
            with pytest.raises(CorruptStoreError, match="logitstore vocab-map"):
                saved_vocabulary_map(store, STUDENT.fingerprint())
            assert {p.file for p in verify(store.folder, quiet=True).problems} == {name}
            (store.folder / name).write_bytes(files[name])
    for name in files:
        (store.folder / name).unlink()
        assert {p.file for p in verify(store.folder, quiet=True).problems} == {name}
        report = repair(store.folder, None, quiet=True)
        assert report.mended == [f"{FOLDER} was damaged and is removed; `logitstore vocab-map` computes it again"]
        assert (
            not verify(store.folder, quiet=True).problems and saved_vocabulary_map(store, STUDENT.fingerprint()) is None
        )
        save_vocabulary_map(store, MAP)


def test_a_damaged_map_is_replaced_when_it_is_saved(store: ZarrStore) -> None:
    save_vocabulary_map(store, MAP)
    flip(store.folder / FOLDER / "ids" / "c" / "0" / "0")
    save_vocabulary_map(store, MAP)
    assert equal(saved_vocabulary_map(store, STUDENT.fingerprint()), MAP) and not list(store.folder.glob(".*"))


@pytest.mark.parametrize(
    "wrong",
    [
        {"student_size": 5},
        {"student_size": -1},
        {"student_size": True},
        {"links": 1},
        {"links": 1 << 40},
        {"teacher": None},
        {"files": {"../x": {"bytes": 1, "digest": ""}}},
        {"files": []},
        {"more": 1},
    ],
    ids=str,
)
def test_a_map_that_says_what_cannot_be_is_refused(store: ZarrStore, wrong: dict[str, object]) -> None:
    save_vocabulary_map(store, MAP)
    reseal(store.folder / FOLDER / GROUP, **wrong)
    with pytest.raises(CorruptStoreError):
        saved_vocabulary_map(store, STUDENT.fingerprint())
    assert f"{FOLDER}/{GROUP}" in {p.file for p in verify(store.folder, quiet=True).problems}


def test_what_is_no_map_is_a_stray(store: ZarrStore) -> None:
    (store.folder / f"{MAP_PREFIX}mine").mkdir()
    (store.folder / f"{MAP_PREFIX}mine" / "x").write_text("x")
    save_vocabulary_map(store, MAP)
    (store.folder / FOLDER / "x").write_text("x")
    named = {problem.file for problem in verify(store.folder, quiet=True).problems}
    assert named == {f"{MAP_PREFIX}mine/x", f"{FOLDER}/x"}


def not_kept(kept: KeptMap) -> str:
    assert kept.computed and equal(kept.vocabulary_map, MAP)
    return kept.not_kept


def test_a_store_that_cannot_be_written_says_so_and_serves_what_it_has(store: ZarrStore, tmp_path: Path) -> None:
    convert(store.folder, tmp_path / "s.zip", quiet=True)
    convert(store.folder, tmp_path / "s.lmdb", quiet=True)
    assert "can only be read" in not_kept(vocabulary_map_of(open_store(tmp_path / "s.zip"), STUDENT))
    assert "has no place" in not_kept(vocabulary_map_of(open_store(tmp_path / "s.lmdb"), STUDENT))
    save_vocabulary_map(store, MAP)
    convert(store.folder, tmp_path / "with.zip", quiet=True)
    zipped = open_store(tmp_path / "with.zip")
    assert equal(saved_vocabulary_map(zipped, STUDENT.fingerprint()), MAP)
    assert not verify(tmp_path / "with.zip", quiet=True).problems
    convert(store.folder, tmp_path / "with.lmdb", quiet=True)
    assert saved_vocabulary_map(open_store(tmp_path / "with.lmdb"), STUDENT.fingerprint()) is None


def test_a_store_behind_http_serves_the_map_that_it_has_and_keeps_no_other(store: ZarrStore) -> None:
    store.save_index()
    save_vocabulary_map(store, map_vocabularies(VOCABULARY, OTHER))
    renamed = store.folder.rename(store.folder.with_name("s"))
    with served(partial(FolderHandler, directory=renamed.parent, asked=[])) as url:
        opened = open_store(url)
        assert not vocabulary_map_of(opened, OTHER).computed
        assert "can only be read" in not_kept(vocabulary_map_of(opened, STUDENT))


def test_a_folder_without_permission_is_told(store: ZarrStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("logitstore.durable.publish", refused)
    assert not_kept(vocabulary_map_of(store, STUDENT)) == f"{store.folder} cannot be written: Permission denied"
    assert not list(store.folder.glob(".partial-*")) and map_folders(store.files) == []
    with pytest.raises(StoreWriteError):
        save_vocabulary_map(store, MAP)


def test_maps_go_where_the_documents_go(store: ZarrStore, tmp_path: Path) -> None:
    other = small_store(tmp_path / "o.zarr", shards=1, lengths=(9,))
    other.write_documents(records([11], 7))
    save_vocabulary_map(store, MAP)
    vocabulary_map_of(other, OTHER)
    merge([store.folder, other.folder], tmp_path / "m.zarr", quiet=True)
    merged = open_store(tmp_path / "m.zarr")
    assert isinstance(merged, ZarrStore) and len(map_folders(merged.files)) == 2
    assert equal(saved_vocabulary_map(merged, STUDENT.fingerprint()), MAP)
    assert not verify(tmp_path / "m.zarr", quiet=True).problems


def test_its_seal_names_both_tokenizers(store: ZarrStore) -> None:
    save_vocabulary_map(store, MAP)
    said = json.loads((store.folder / FOLDER / GROUP).read_text())["attributes"]
    assert (said["teacher"], said["student"]) == (VOCABULARY.fingerprint(), STUDENT.fingerprint())
