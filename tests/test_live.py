"""A build keeps how far its store lies from the live teacher; `verify --live` asks again."""

import shutil
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from logitstore.entries import shard_name
from logitstore.errors import IncompatibleStoreError
from logitstore.fidelity import Fidelity
from logitstore.files import LocalFiles
from logitstore.gc import gc
from logitstore.live import keep_fidelity, replay
from logitstore.store import open_store
from logitstore.teacher import Teacher
from logitstore.zarr_store import ZarrStore
from tests.runs import World, make_world
from tests.tiny import CORPUS, save_tiny_model


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("live"))


def softmax(z: np.ndarray) -> np.ndarray:
    p = np.exp(z.astype(np.float64) - z.max(axis=-1, keepdims=True))
    return p / p.sum(axis=-1, keepdims=True)


def test_the_fidelity_of_a_build_is_that_of_its_documents_against_the_live_teacher(world: World) -> None:
    store, teacher = open_store(world.store), Teacher(str(world.teacher), quiet=True)
    assert store.fidelity is not None and store.fidelity["documents"] == len(CORPUS)
    found = Fidelity.from_json(store.fidelity)
    assert found.positions == store.positions  # a small store is measured whole
    l1, kept = [], []
    for number in range(len(store)):
        token_ids, targets = store.document(number)
        p = np.take_along_axis(softmax(np.concatenate(list(teacher.logits(token_ids)))), targets.ids.astype(int), 1)
        in_head = np.arange(p.shape[1]) < targets.head_count[:, None]
        l1.append((np.abs(targets.weights - p) * in_head).sum(axis=1))
        kept.append(p.sum(axis=1))
    assert found.head_l1 == pytest.approx(np.concatenate(l1).mean(), rel=1e-4)
    assert found.kept_mass == pytest.approx(np.concatenate(kept).mean(), rel=1e-4)


def test_it_is_measured_again_only_where_documents_were_added(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(world.store)
    monkeypatch.delattr(Teacher, "logits")
    keep_fidelity(store, Teacher(str(world.teacher), quiet=True), quiet=True)


def test_it_is_measured_also_where_gc_takes_a_shard_away_meanwhile(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(world.store, tmp_path / "s.zarr")
    (tmp_path / "s.zarr" / "fidelity" / "zarr.json").unlink()
    store, other = (ZarrStore(LocalFiles(tmp_path / "s.zarr"), tmp_path / "s.zarr") for _ in range(2))
    orders = permutations(map(other.record, range(len(other))))
    before = other.shard_names[0]
    other.write_documents(next(p for p in orders if shard_name(b"".join(d.key for d in p)) < before))
    store.refresh()
    other.save_index()  # of two that say the same it has the other first
    monkeypatch.setattr("logitstore.files.OPEN_FILES", 1)  # as in a store of many shards
    monkeypatch.setattr("logitstore.catalog.MOST_OPEN", 0)
    logits, removed = Teacher.logits, list[str]()

    def meanwhile(teacher: Teacher, token_ids: Any) -> Any:
        removed.extend(leftover.path.name for leftover in gc(tmp_path / "s.zarr").removed)
        return logits(teacher, token_ids)

    monkeypatch.setattr(Teacher, "logits", meanwhile)
    keep_fidelity(store, Teacher(str(world.teacher), quiet=True), quiet=True)
    assert removed == [before] and store.fidelity == open_store(world.store).fidelity


def test_a_replay_finds_every_entry_equal_and_the_same_teacher_needed(world: World, tmp_path: Path) -> None:
    store = open_store(world.store)
    found = replay(store, Teacher(str(world.teacher), quiet=True), 4, seed=1, quiet=True)
    assert found.documents == 4 and found.ok and found.equal_entries >= 0.999 * found.entries > 0
    assert found.to_json()["ok"] is True and "4 documents" in found.to_text()
    other = Teacher(str(save_tiny_model(tmp_path / "other", seed=9)), quiet=True)
    with pytest.raises(IncompatibleStoreError, match="teacher weights"):
        replay(store, other, 4, seed=1, quiet=True)
