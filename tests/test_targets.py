from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from distill_trainer.target_source import open_stores, target_source
from distill_trainer.targets import TargetSource
from distill_trainer.teachers import in_order
from logitstore.errors import ConfigError, IncompatibleStoreError, MissingTargetsError, StoreWriteError
from logitstore.journal import ShardWriter
from logitstore.store import open_store
from logitstore.targets import SparseTargets
from logitstore.teacher import Teacher
from logitstore.verify import verify
from tests.runs import World, make_world
from tests.tiny import tiny_tokenizer


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


def equal(a: SparseTargets | None, b: SparseTargets | None) -> bool:
    assert a is not None
    assert b is not None
    return all(np.array_equal(x, y) for x, y in zip(asdict(a).values(), asdict(b).values(), strict=True))


@pytest.mark.parametrize(("select", "temperature"), [("threshold:16", 1.0), ("threshold:4", 2.0), ("top-k:8", 1.0)])
def test_a_hit_and_a_miss_are_the_same_bytes(tmp_path: Path, world: World, select: str, temperature: float) -> None:
    # every document a batch of its own
    world.build(tmp_path / "built.zarr", batch_tokens=1, select=select, temperature=(temperature,))
    there = {"store": (str(tmp_path / "kept.zarr"),), "write_back": True, "teacher": str(world.teacher)}
    kept = world.config(tmp_path / "o", select=select, temperature=temperature, **there)
    built = open_store(tmp_path / "built.zarr")
    with target_source(kept, open_stores(kept), tiny_tokenizer()) as online:
        for sequence in world.sequences():
            (live,), count = online.answer([sequence])
            assert (count.hits, count.misses) == (0, len(sequence.trained))
            assert equal(live, built.get(sequence.token_ids))
    assert contents(tmp_path / "kept.zarr") == contents(built.path)  # but for the fidelity that a build measures


def contents(store: Path) -> dict[str, bytes]:
    """Every file of a store, by its name."""
    return {
        file.relative_to(store).as_posix(): file.read_bytes()
        for file in store.glob("*/**/*")
        if file.is_file() and file.parent.name != "fidelity"
    }


def test_each_policy_does_what_it_says_on_a_miss_and_counts_it(tmp_path: Path, world: World) -> None:
    world.build(tmp_path / "part.zarr", limit=2)
    stores, sequences = in_order([open_store(tmp_path / "part.zarr")]), world.sequences()
    recipe = stores.recipe
    assert recipe is not None
    hits, misses = (sum(int(s.trained.sum()) for s in part) for part in (sequences[:2], sequences[2:]))
    for policy in ("skip", "hard-only"):
        answers, count = TargetSource(stores, recipe, policy).answer(sequences)
        assert [answer is not None for answer in answers] == [True, True, False, False, False, False]
        assert (count.hits, count.misses) == (hits, misses)
    answers, count = TargetSource(stores, recipe, "online", Teacher(str(world.teacher))).answer(sequences)
    assert None not in answers
    assert (count.hits, count.misses) == (hits, misses)
    with pytest.raises(MissingTargetsError, match=r"data.jsonl:3 is not in the store; type --teacher T"):
        TargetSource(stores, recipe, "error").answer(sequences)


def test_stores_are_asked_in_order_and_differing_ones_refused(tmp_path: Path, world: World) -> None:
    world.build(tmp_path / "first.zarr", limit=2)
    world.build(tmp_path / "other.zarr", limit=2, temperature=(2.0,))
    both = world.config(tmp_path / "o", store=(str(tmp_path / "first.zarr"), str(world.store)))
    with target_source(both, open_stores(both), tiny_tokenizer()) as source:
        assert source.missing(world.sequences()) == 0
        assert None not in source.answer(world.sequences())[0]
    with pytest.raises(IncompatibleStoreError, match=r"other.zarr was built with temperature 2.* this run has 1"):
        open_stores(world.config(tmp_path / "o", store=(str(world.store), str(tmp_path / "other.zarr"))))


def test_temperature_and_selection_are_the_stores_and_others_are_refused_with_the_flag(
    tmp_path: Path, world: World
) -> None:
    world.build(tmp_path / "warm.zarr", temperature=(2.0,), select="threshold:8")
    path = (str(tmp_path / "warm.zarr"),)
    for options in ({}, {"temperature": 2.0, "select": "threshold:8"}):
        (store,) = open_stores(world.config(tmp_path / "o", store=path, **options)).stores
        assert (store.manifest.recipe.temperatures, str(store.manifest.recipe.selection)) == ((2.0,), "threshold:8")
    with pytest.raises(
        ConfigError, match=r"serves temperature 2, this run asks for 1; .* `logitstore build --temperature 1`"
    ):
        open_stores(world.config(tmp_path / "o", store=path, temperature=1.0))
    with pytest.raises(
        ConfigError, match=r"threshold:8, this run asks for top-k:8; .* `logitstore build --select top-k:8`"
    ):
        open_stores(world.config(tmp_path / "o", store=path, select="top-k:8"))


def test_a_loss_that_a_live_teacher_cannot_serve_is_told_before_anything_is_loaded(
    world: World, tmp_path: Path
) -> None:
    for kept in ({}, {"store": (str(tmp_path / "new.zarr"),), "write_back": True}):
        with pytest.raises(IncompatibleStoreError, match=r"^the teacher cannot serve --loss reverse-kl: .* --select"):
            open_stores(world.config(tmp_path / "o", teacher="/none", loss=("reverse-kl",), **kept))


def test_what_was_written_back_needs_no_teacher_the_next_time(tmp_path: Path, world: World) -> None:
    store = str(tmp_path / "new.zarr")
    first, _ = world.train(tmp_path / "a", store=(store,), teacher=str(world.teacher), write_back=True, iters=4)
    assert (first.count.hits > 0) == (first.trained_tokens > first.count.misses)
    report = verify(Path(store), quiet=True)
    assert not report.problems
    assert report.documents == len(world.sequences())
    second, _ = world.train(tmp_path / "b", store=(store,), iters=4)
    assert second.count.misses == 0
    assert second.count.hits == second.trained_tokens


def test_written_back_answers_go_into_the_first_store_and_the_second_is_left_alone(
    tmp_path: Path, world: World
) -> None:
    world.build(tmp_path / "shared.zarr", limit=4)
    stores = (str(tmp_path / "mine.zarr"), str(tmp_path / "shared.zarr"))
    world.train(tmp_path / "a", store=stores, teacher=str(world.teacher), write_back=True, iters=3)
    assert [len(open_store(path)) for path in stores] == [2, 4]


def test_a_second_run_that_writes_back_into_the_same_store_is_told_so(tmp_path: Path, world: World) -> None:
    world.build(tmp_path / "s.zarr", limit=2)
    config = world.config(
        tmp_path / "o", store=(str(tmp_path / "s.zarr"),), teacher=str(world.teacher), write_back=True
    )
    with (
        ShardWriter(open_store(tmp_path / "s.zarr"), "write-back"),
        pytest.raises(StoreWriteError, match="another process is writing write-back"),
        target_source(config, open_stores(config), tiny_tokenizer()),
    ):
        pass


def test_an_interrupted_run_keeps_what_the_teacher_answered(tmp_path: Path, world: World) -> None:
    config = world.config(
        tmp_path / "o", store=(str(tmp_path / "s.zarr"),), teacher=str(world.teacher), write_back=True
    )
    with pytest.raises(KeyboardInterrupt), target_source(config, in_order([]), tiny_tokenizer()) as source:
        source.answer(world.sequences()[:2])
        raise KeyboardInterrupt
    store = open_store(tmp_path / "s.zarr")
    assert [store.get(s.token_ids) is not None for s in world.sequences()[:3]] == [True, True, False]
    assert not verify(store.path, quiet=True).problems


def test_an_online_run_without_a_store_does_not_read_the_weights_again_for_a_digest(
    tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(Teacher, "manifest")
    config = world.config(tmp_path / "o", teacher=str(world.teacher), select="top-k:8", temperature=2.0)
    with target_source(config, in_order([]), tiny_tokenizer()) as source:
        assert (str(source.recipe.selection), source.recipe.temperatures) == ("top-k:8", (2.0,))
        assert None not in source.answer(world.sequences()[:2])[0]
