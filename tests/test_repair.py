"""A damaged store is made whole: nothing is deleted, what can be told is asked again, the rest is named."""

import json
import shutil
from collections.abc import Callable
from errno import EMFILE
from pathlib import Path

import numpy as np
import pytest

from logitstore import plan
from logitstore.errors import ConfigError, CorruptStoreError, IncompatibleStoreError, StoreLostError
from logitstore.files import LocalFiles
from logitstore.merge import convert
from logitstore.quarantine import put_shards_aside
from logitstore.repair import repair
from logitstore.sealed import GROUP
from logitstore.store import open_store
from logitstore.verify import verify
from logitstore.zarr_store import ZarrStore
from tests.kills import drive
from tests.runs import make_world
from tests.stores import VOCABULARY, contents, manifest, shard_folder, tokens
from tests.stubs import Stub, answer, flip, make
from tests.test_convert import held


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ZarrStore:
    monkeypatch.setattr(plan, "SHARD_POSITIONS", 100)
    return make(tmp_path / "s.zarr")


def good(path: Path) -> bool:
    return verify(path, quiet=True).problems == []


def test_a_good_store_is_left_alone(store: ZarrStore) -> None:
    before = contents(store.folder)
    for teacher in (None, Stub()):
        report = repair(store.folder, teacher, quiet=True)
        assert report.to_text() == "" and contents(store.folder) == before


@pytest.mark.parametrize(
    "file", ["blocks/c/0", "blocks/zarr.json", "positions/zarr.json", GROUP, "documents/zarr.json"]
)
def test_a_damaged_shard_goes_out_of_the_way_and_the_teacher_is_asked_again(store: ZarrStore, file: str) -> None:
    found = held(store.folder)
    shard = shard_folder(store, 1)
    flip(shard / file)
    damaged = contents(shard)
    teacher = Stub()
    report = repair(store.folder, teacher, quiet=True)
    assert report.quarantined == [f"shards/.quarantine-{shard.name}"] and not report.misses
    assert contents(store.folder / report.quarantined[0]) == damaged
    assert held(store.folder) == found and good(store.folder)
    assert report.recomputed == teacher.asked > 0
    assert repair(store.folder, teacher, quiet=True).recomputed == 0


def test_without_a_teacher_its_documents_are_misses_by_name_and_a_teacher_may_come_later(store: ZarrStore) -> None:
    found = held(store.folder)
    shard = store.shard(sorted(store.shard_names)[0])
    keys = [key.tobytes().hex() for key in shard.keys]
    flip(shard_folder(store, 0) / "blocks" / "c" / "0")
    report = repair(store.folder, quiet=True)
    assert report.misses == keys
    assert f"{len(keys)} documents became misses, by key:\n{keys[0]}\n" in report.to_text()
    assert good(store.folder) and len(open_store(store.folder)) == len(found) - len(keys)
    assert repair(store.folder, Stub(), quiet=True).recomputed == len(keys)
    assert held(store.folder) == found


def test_documents_of_which_tokens_are_damaged_are_misses_and_the_others_are_not(tmp_path: Path) -> None:
    store = make(tmp_path / "long.zarr", [1500, 1500, 1500])  # chunks of 2,048 positions, of one shard
    with store.writer("all") as writer:
        every = [answer(tokens(s, 1500), manifest().recipe) for s in range(10, 13)]
        writer.append(every)
        writer.commit([document.key for document in every])
    name = next(n for n in store.shard_names if store.shard(n).entry.documents == 3)
    flip(store.folder / "shards" / name / "positions" / "c" / "0" / "0", 0.1)
    report = repair(store.folder, Stub(), quiet=True)
    assert (report.recomputed, len(report.misses)) == (1, 2)
    assert good(store.folder) and len(open_store(store.folder)) == 4


def test_a_shard_that_does_not_tell_what_it_held_is_counted(store: ZarrStore) -> None:
    flip(shard_folder(store, 0) / "documents" / "c" / "0" / "0")
    report = repair(store.folder, Stub(), quiet=True)
    assert report.unnamed == 1 and "do not tell which documents they held" in report.to_text()
    assert good(store.folder)


def test_a_damaged_index_is_written_again_and_a_damaged_measurement_removed(store: ZarrStore) -> None:
    before = contents(store.folder)
    for file in ("zarr.json", "keys/c/0", "counts/c/0/0"):
        flip(store.folder / "index" / file)
        assert not good(store.folder)
        assert repair(store.folder, quiet=True).mended == ["the index was damaged and is written again"]
        assert contents(store.folder) == before
    flip(store.folder / "fidelity" / GROUP)
    assert "is removed" in repair(store.folder, quiet=True).to_text()
    assert good(store.folder) and open_store(store.folder).fidelity is None


def test_a_shard_that_is_gone_is_told_and_the_index_forgets_it(store: ZarrStore) -> None:
    shutil.rmtree(shard_folder(store, 0))
    assert not good(store.folder)
    (said,) = repair(store.folder, quiet=True).mended
    assert "is gone: its documents are misses" in said
    assert good(store.folder)


def test_a_stray_file_in_a_shard_is_moved_out_and_one_elsewhere_stays_and_is_named(store: ZarrStore) -> None:
    found = held(store.folder)
    inside, outside = shard_folder(store, 0) / "notes.txt", store.folder / "notes.txt"
    for stray in (inside, outside):
        stray.write_text("mine")
    report = repair(store.folder, quiet=True)
    assert not report.quarantined and "notes.txt is no part of its shard" in report.to_text()
    assert [p.file for p in verify(store.folder, quiet=True).problems] == ["notes.txt"]
    assert held(store.folder) == found
    assert b"mine" in [data for name, data in contents(store.folder / "shards").items() if name.startswith(".")]


def test_a_shard_damaged_twice_is_quarantined_twice(store: ZarrStore) -> None:
    found = held(store.folder)
    for _ in range(2):
        shards = {p.name: p for p in (store.folder / "shards").iterdir() if p.name[0] != "."}
        flip(shards[min(shards)] / "blocks" / "zarr.json")
        repair(store.folder, Stub(), quiet=True)
    assert len(list((store.folder / "shards").glob(".quarantine-*"))) == 2
    assert held(store.folder) == found and good(store.folder)


@pytest.mark.parametrize("each", [3, 40])
def test_what_keeps_a_document_from_being_looked_up_that_only_begins_alike_is_put_aside(
    tmp_path: Path, each: int
) -> None:
    made, system = manifest(), tokens(1, 40)
    store = ZarrStore.create(tmp_path / "a.zarr", made, VOCABULARY)
    for seed in range(3):
        documents = [np.append(system, tokens(100 * seed + i + 2, 5)) for i in range(each)]
        store.write_documents([answer(token_ids, made.recipe) for token_ids in documents])
    damaged = [shard_folder(store, number).name for number in (0, 2)]
    for name in damaged:
        flip(store.folder / "shards" / name / "entries-0" / "c" / "0" / "0")
    new = np.append(system, tokens(999, 5))
    moved = put_shards_aside(store.folder, new)
    assert sorted(moved) == [f"shards/.quarantine-{name}" for name in damaged]
    assert open_store(store.folder).answered(new) >= 39 and len(open_store(store.folder)) == each


def test_a_shard_of_another_store_is_put_aside_and_not_asked_for(store: ZarrStore, tmp_path: Path) -> None:
    made = manifest(seed=7)
    other = ZarrStore.create(tmp_path / "o.zarr", made, VOCABULARY)
    other.write_documents([answer(tokens(77, 9), made.recipe)])
    shutil.copytree(shard_folder(other), store.folder / "shards" / shard_folder(other).name)
    report = repair(store.folder, Stub(), quiet=True)
    assert len(report.quarantined) == 1 and report.recomputed == 0 and not report.misses
    assert good(store.folder)


def test_what_cannot_be_read_now_is_no_damage(store: ZarrStore, monkeypatch: pytest.MonkeyPatch) -> None:
    before, read, store = contents(store.folder), LocalFiles.read, open_store(store.folder)
    token_ids = store.token_ids(0)

    def too_many(self: LocalFiles, name: str, *span: int) -> bytes:
        if "/entries-0/c/" in name or name.startswith("fidelity"):
            raise OSError(EMFILE, "Too many open files")
        return read(self, name, *span)

    monkeypatch.setattr(LocalFiles, "read", too_many)
    looks: list[Callable[[], object]] = [
        lambda: open_store(store.folder).get(token_ids),
        lambda: repair(store.folder, quiet=True),
        lambda: put_shards_aside(store.folder, token_ids),
    ]
    for look in looks:
        with pytest.raises(StoreLostError, match=r"cannot be read now \(Too many open files\), which is no damage"):
            look()
    assert not list(store.folder.glob("shards/.quarantine-*"))
    assert {name: data for name, data in before.items() if not name.startswith("index/")}.items() <= contents(
        store.folder
    ).items()


def test_what_cannot_be_repaired_is_told_in_one_line_and_left_alone(store: ZarrStore, tmp_path: Path) -> None:
    convert(store.folder, tmp_path / "s.lmdb", quiet=True)
    flip(shard_folder(store) / "blocks" / "c" / "0")
    vocabulary = store.folder / "vocabulary" / "lengths" / "c" / "0" / "0"
    before = contents(store.folder)
    with pytest.raises(IncompatibleStoreError, match="built with teacher weights"):
        repair(store.folder, Stub("b" * 32), quiet=True)
    with pytest.raises(ConfigError, match="only folders can be repaired"):
        repair(tmp_path / "s.lmdb", quiet=True)
    assert contents(store.folder) == before
    flip(vocabulary)
    before = contents(store.folder)
    with pytest.raises(CorruptStoreError, match=r"vocabulary/lengths/c/0/0 .* cannot be repaired") as raised:
        repair(store.folder, quiet=True)
    assert "\n" not in str(raised.value) and contents(store.folder) == before


def test_the_real_teacher_and_its_dataset_bring_back_what_the_shard_cannot_tell(tmp_path: Path) -> None:
    from click.testing import CliRunner

    from distill_cli.logitstore import main

    world = make_world(tmp_path)
    found = held(world.store)
    (shard,) = (p for p in (world.store / "shards").iterdir() if p.is_dir())
    flip(shard / "documents" / "c" / "0" / "0")
    line = ["verify", str(world.store), "--quiet"]
    assert CliRunner().invoke(main, line).exit_code == 1
    line += ["--repair", "--teacher", str(world.teacher), "--dataset", str(world.data)]
    result = CliRunner().invoke(main, line)
    assert result.exit_code == 0, result.output
    assert "computed 6 documents again" in result.stdout and "all good" in result.stdout
    assert held(world.store) == found
    line = ["verify", str(world.store), "--json", "--live", "3", "--teacher", str(world.teacher)]
    result = CliRunner().invoke(main, line)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["live"]["ok"] and json.loads(result.stdout)["live"]["documents"] == 3
    line[-1] = str(world.student)
    assert "built with teacher weights" in CliRunner().invoke(main, line).stderr


KILLS = """
from logitstore.repair import repair
from tests.stubs import Stub, flip, make

make(folder / "s.zarr")
for number, shard in enumerate(sorted(p for p in (folder / "s.zarr" / "shards").iterdir() if p.is_dir())):
    if number != 1:
        flip(shard / "blocks" / "zarr.json")
flip(folder / "s.zarr" / "fidelity" / "zarr.json")

def act(trial):
    repair(trial, TEACHER, batch_tokens=64, quiet=True)

run_killed(lambda trial: shutil.copytree(folder / "s.zarr", trial), act, contents)
"""


@pytest.mark.parametrize("teacher", ["None", "Stub()"])
def test_killed_at_20_random_moments_and_typed_again_it_ends_with_the_same_bytes(teacher: str) -> None:
    drive(KILLS.replace("TEACHER", teacher))
