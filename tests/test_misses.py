"""`--on-miss` in runs: a teacher that goes away is counted and lived without; a store's holes change no loss."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from distill_cli.distill_train import main
from distill_trainer import live_teacher
from distill_trainer.batches import epochs
from distill_trainer.live_teacher import LiveTeacher
from distill_trainer.train import train
from logitstore.errors import MissingTargetsError, ModelError, StoreWriteError, TeacherLostError, UnusableLogitsError
from logitstore.journal import ShardWriter
from logitstore.store import open_store
from logitstore.teacher import Teacher
from tests.runs import World, make_world, write_jsonl
from tests.tiny import CHAT_TEMPLATE, CORPUS

TEXTS = (
    *CORPUS,
    "Ask, and keep the answer.",
    "What nobody asked is a miss.",
    "Ten documents, and",
    "one is not there.",
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"), TEXTS)


@pytest.fixture
def killed(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[int]]:
    """Lets the teacher fail from its call of this number on; the list grows with every call."""
    monkeypatch.setattr(live_teacher, "FIRST_WAIT_S", 0)
    answer = Teacher.records

    def kill(at: int) -> list[int]:
        calls: list[int] = []

        def records(*args: Any) -> Any:
            calls.append(1)
            if len(calls) >= at:
                raise RuntimeError("[metal::malloc] the device is gone\nand more")
            return answer(*args)

        monkeypatch.setattr(Teacher, "records", records)
        return calls

    return kill


@pytest.mark.parametrize("policy", ["hard-only", "skip"])
def test_a_run_whose_teacher_is_killed_at_step_5_ends_and_is_counted_right(
    tmp_path: Path, world: World, killed: Callable[[int], list[int]], policy: str
) -> None:
    calls, said = killed(5), list[str]()
    config = world.config(tmp_path / "o", teacher=str(world.teacher), iters=9, on_miss=policy)
    report = train(config, lambda line: said.append(str(line)))
    sequences = world.sequences()
    batches = islice(epochs([len(s.trained) for s in sequences], 2, config.seed), 9)
    positions = [sum(int(sequences[i].trained.sum()) for i in numbers) for _, numbers in batches]
    steps = metrics(tmp_path / "o")
    assert [step["misses"] for step in steps] == positions
    assert [step["failed"] for step in steps] == [0, 0, 0, 0, *positions[4:]]
    assert [step["kd_loss"] is None for step in steps] == [False] * 4 + [True] * 5
    assert [step["trained_tokens"] for step in steps] == positions[:4] + (positions if policy != "skip" else [0] * 9)[
        4:
    ]
    assert (report.steps, report.count.misses, report.count.failed) == (9, sum(positions), sum(positions[4:]))
    assert len(calls) == 4 + 1 + live_teacher.RETRIES  # and never again
    (lost,) = [line for line in said if "answers no more" in line]
    assert "RuntimeError: [metal::malloc] the device is gone; from here on" in lost and "\n" not in lost
    assert any(line.startswith("without a store all of 10 documents miss: the teacher is asked, and") for line in said)


def metrics(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_with_a_store_a_lost_teacher_costs_the_misses_alone(
    tmp_path: Path, world: World, killed: Callable[[int], list[int]]
) -> None:
    world.build(tmp_path / "s.zarr", limit=6)
    killed(1)
    arguments = ["--student", world.student, "--dataset", world.data, "--teacher", world.teacher, "--iters", "5"]
    arguments += ["--store", tmp_path / "s.zarr", "--out", tmp_path / "o", "--on-miss", "hard-only", "--batch-size", 2]
    result = CliRunner().invoke(main, [*map(str, arguments), "--write-back"])
    assert result.exit_code == 0, result.output
    sizes = [int(s.trained.sum()) for s in world.sequences()]
    assert "6 of 10 documents are in the store, 4 miss; on a miss: the teacher is asked, and positions" in result.output
    hits, misses = sum(sizes[:6]), sum(sizes[6:])
    assert (
        f"{hits:,} hits, {misses:,} misses (positions), {misses:,} of them not answered by the teacher" in result.output
    )
    assert len(open_store(tmp_path / "s.zarr")) == 6
    assert "misses on which the teacher was silent too" in (tmp_path / "o" / "report.html").read_text()


def test_online_a_lost_teacher_stops_the_run_with_what_was_learned_and_resume_goes_on(
    tmp_path: Path, world: World, killed: Callable[[int], list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"teacher": str(world.teacher), "iters": 8}
    world.train(tmp_path / "whole", **options)
    killed(5)
    with pytest.raises(
        TeacherLostError,
        match=r"asked 5 times: RuntimeError: .* is gone; type --on-miss hard-only .*; what was learned in 4 steps is "
        r"saved in .*; --resume goes on",
    ):
        world.train(tmp_path / "o", **options)
    assert (tmp_path / "o" / "adapters.safetensors").exists()
    with pytest.raises(TeacherLostError, match="type --on-miss hard-only"):
        world.train(tmp_path / "none", **options | {"iters": 1})
    assert not (tmp_path / "none").exists()
    monkeypatch.undo()
    world.train(tmp_path / "o", **options, resume=True, on_miss="hard-only")
    assert [step["loss"] for step in metrics(tmp_path / "o")] == [step["loss"] for step in metrics(tmp_path / "whole")]


class Flaky:
    """Fails so many times with each of some errors, then answers."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)

    def records(self, documents: list[Any], recipe: object) -> list[Any]:
        assert recipe is None
        if self.errors:
            raise self.errors.pop(0)
        return ["record"] * len(documents)


def test_a_teacher_that_fails_is_asked_again_after_growing_waits_and_a_bounded_number_of_times() -> None:
    kinds = [OSError("no route"), MemoryError(), ModelError("gone"), RuntimeError("malloc")]
    for errors, answered in ((kinds, True), ([*kinds, OSError("still")], False)):
        waits: list[float] = []
        teacher: Any = Flaky(*errors)
        live = LiveTeacher(teacher, "skip", sleep=waits.append)
        documents, recipe = [np.arange(4, dtype=np.int32)], None
        assert live.records(documents, recipe) == (["record"] if answered else [None])  # type: ignore[arg-type]
        assert waits == [0.5, 1, 2, 4]
        assert live.lost == (not answered)
    assert live.records(documents, recipe) == [None]  # type: ignore[arg-type]


def test_logits_that_are_no_numbers_lose_their_document_and_not_the_teacher(
    tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad, answer = world.sequences()[3].token_ids, Teacher.records

    def records(self: Teacher, documents: Any, recipe: Any) -> Any:
        if any(np.array_equal(token_ids, bad) for token_ids in documents):
            raise UnusableLogitsError("teacher T cannot be used: NaN")
        return answer(self, documents, recipe)

    monkeypatch.setattr(Teacher, "records", records)
    options = {"teacher": str(world.teacher), "iters": 5}
    with pytest.raises(UnusableLogitsError, match="cannot be used: NaN"):
        world.train(tmp_path / "stops", **options)
    said: list[str] = []
    config = world.config(tmp_path / "o", **options, on_miss="hard-only", write_back=True, store=(str(tmp_path / "s"),))
    count = train(config, lambda line: said.append(str(line))).count
    assert (count.failed, count.hits) == (len(bad) - 1, 0)
    assert sum("positions of such documents are trained on their labels alone" in line for line in said) == 1
    assert len(open_store(tmp_path / "s")) == 9


def test_online_logits_that_are_no_numbers_stop_the_run_with_what_was_learned(
    tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer, asked = Teacher.records, []

    def records(self: Teacher, documents: Any, recipe: Any) -> Any:
        asked.append(documents)
        if len(asked) > 2:
            raise UnusableLogitsError("teacher T cannot be used: NaN")
        return answer(self, documents, recipe)

    monkeypatch.setattr(Teacher, "records", records)
    with pytest.raises(UnusableLogitsError, match=r"type --on-miss hard-only .*; what was learned in 2 steps is saved"):
        world.train(tmp_path / "o", teacher=str(world.teacher), iters=5)
    assert (tmp_path / "o" / "adapters.safetensors").exists()
    world.train(tmp_path / "o", teacher=str(world.teacher), iters=5, resume=True, on_miss="hard-only")
    assert len(metrics(tmp_path / "o")) == 5


@pytest.mark.parametrize("fails_at", ["append", "commit"])
def test_answers_that_cannot_be_kept_cost_nothing_of_what_was_learned(
    tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch, fails_at: str
) -> None:
    appended: list[int] = []

    def append(self: ShardWriter, documents: Any) -> None:
        appended.append(1)
        if fails_at == "append" and len(appended) > 2:
            raise StoreWriteError("the disk is full")
        self.pending.update((document.key, document) for document in documents)

    def commit(*_: Any) -> None:
        raise StoreWriteError("the disk is full")

    monkeypatch.setattr(ShardWriter, "append", append)
    monkeypatch.setattr(ShardWriter, "commit", commit)
    options = {"teacher": str(world.teacher), "store": (str(tmp_path / "s"),), "write_back": True, "iters": 4}
    steps = 2 if fails_at == "append" else 4
    with pytest.raises(StoreWriteError, match=f"the disk is full; what was learned in {steps} steps is saved in"):
        world.train(tmp_path / "o", **options)
    assert (tmp_path / "o" / "adapters.safetensors").exists()


def test_whatever_share_of_the_store_is_removed_the_loss_curve_is_the_same_and_a_second_run_has_no_miss(
    tmp_path: Path, world: World
) -> None:
    curves, options = [], {"iters": 10, "teacher": str(world.teacher), "write_back": True}
    for removed in (0, 1, 10):
        store = str(tmp_path / f"{removed}.zarr")
        if removed < 10:
            world.build(Path(store), limit=10 - removed)
        first, steps = world.train(tmp_path / f"{removed}-a", store=(store,), **options)
        curves.append([step["loss"] for step in steps])
        sizes = [int(s.trained.sum()) for s in world.sequences()]
        assert first.count.misses == sum(sizes[10 - removed :])  # the second epoch hits what the first has kept
        second, again = world.train(tmp_path / f"{removed}-b", store=(store,), iters=10)
        assert (second.count.misses, second.count.hits) == (0, 2 * sum(sizes))
        assert [step["loss"] for step in again] == pytest.approx(curves[-1], rel=1e-6)
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)
    assert curves[2] == pytest.approx(curves[0], rel=1e-4)


def test_misses_of_a_store_of_another_chat_template_say_so_and_with_that_template_there_are_none(
    world: World, tmp_path: Path
) -> None:
    turns = [{"role": "user", "content": "Who reads?"}, {"role": "assistant", "content": "Every student."}]
    data = str(write_jsonl(tmp_path / "chats.jsonl", [{"messages": turns}]))
    teacher, student, store = tmp_path / "teacher", tmp_path / "student", tmp_path / "s.zarr"
    for path in (teacher, student):
        shutil.copytree(world.folder / path.name, path)
    (teacher / "chat_template.jinja").write_text("{{ bos_token + 'system' }}" + CHAT_TEMPLATE)
    world.build(store, teacher=str(teacher), dataset=data)
    config = world.config(tmp_path / "a", student=str(student), dataset=data, store=(str(store),))
    with pytest.raises(MissingTargetsError, match=r"s\.zarr: built with another chat template than the student's"):
        train(config)
    said: list[str] = []
    train(replace(config, on_miss="hard-only"), said.append)
    assert sum("another chat template" in line for line in said) == 1
    shutil.copy(teacher / "chat_template.jinja", student)
    said.clear()
    assert train(replace(config, out=str(tmp_path / "b")), said.append).count.misses == 0
    assert not any("chat template" in line for line in said)
