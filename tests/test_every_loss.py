"""Each loss that can be asked for: its gradient through a whole student, and that students learn by it."""

from pathlib import Path

import pytest

from distill_trainer.batches import Weighing, collate
from distill_trainer.losses import NAMES
from distill_trainer.objective import Objective
from logitstore.model import load_model
from logitstore.store import open_store
from tests.every_loss import CASES, LEARNT, TOLERANCE, Case, slopes
from tests.runs import World, make_world, write_jsonl
from tests.tiny import CORPUS

TRAINED, HELD_OUT = CORPUS[:4], CORPUS[4:]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = make_world(tmp_path_factory.mktemp("world"), store=False)
    world.build(world.folder / "threshold-16", select="threshold:16", tail_log_probs=True)
    world.build(world.folder / "top-k-50", select="top-k:50")
    write_jsonl(world.folder / "train.jsonl", [{"text": text} for text in TRAINED])
    write_jsonl(world.folder / "valid.jsonl", [{"text": text} for text in HELD_OUT])
    return world


def test_no_loss_is_left_out() -> None:
    assert {case.name for case in CASES} == set(NAMES)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_gradient_through_the_whole_student_is_that_of_differences_in_float64(world: World, case: Case) -> None:
    """Along the gradient and as much noise, in all weights at once: model and formula in float64 NumPy."""
    store = open_store(world.folder / case.store.replace(":", "-"))
    sequences = world.sequences()[:2]
    batch = collate(sequences, [store.get(s.token_ids) for s in sequences], Weighing(1.0, "error"))
    assert batch is not None
    student = load_model(world.student)
    student.model.unfreeze()
    config = world.config(world.folder / "none", store=(str(store.path),), loss=(case.name,))
    losses = Objective(config, store.manifest.recipe, str(store.path)).at(1)
    found, expected = slopes(case, student, losses, batch)
    assert found == pytest.approx(expected, rel=TOLERANCE)


@pytest.mark.parametrize(("case", "live"), LEARNT, ids=[f"{case} {'live' if live else ''}" for case, live in LEARNT])
def test_students_learn_by_it_what_they_have_not_seen(world: World, tmp_path: Path, case: Case, live: bool) -> None:
    store = str(world.folder / case.store.replace(":", "-"))
    source = {"teacher": str(world.teacher), "select": case.store} if live else {"store": (store,)}
    learning = {"alpha": 1.0, "loss": (case.name,), "fine_tune_type": "full", "learning_rate": 2e-3, "iters": 10}
    shown = {"dataset": str(world.folder), "valid_split": "valid", "steps_per_eval": 1}
    _, lines = world.train(tmp_path / "o", **learning, **shown, **source)
    assert lines[-1]["valid_kd_loss"] < lines[0]["valid_kd_loss"]
