"""A temperature that moves: which rung at which step, what a store must serve, and what a run does with it."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import distill_kernels

import numpy as np
import pytest

from distill_trainer.batch_loss import batch_loss
from distill_trainer.batches import Weighing, collate
from distill_trainer.config import TrainConfig
from distill_trainer.losses import loss_of
from distill_trainer.schedule import Schedule
from distill_trainer.temperatures import ladder_of, spaced
from logitstore.errors import ConfigError
from logitstore.model import load_model
from logitstore.recipe import Recipe
from logitstore.selection import Selection
from logitstore.store import open_store
from tests.runs import World, make_world

SERVED = (1.0, 2.0, 4.0)


def recipe(*temperatures: float, select: str = "threshold:16", **options: Any) -> Recipe:
    return Recipe(Selection.parse(select), temperatures, seed=0, vocab_size=384, **options)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = make_world(tmp_path_factory.mktemp("world"), store=False)
    world.build(world.store, temperature=SERVED)
    return world


def test_a_step_takes_the_served_temperature_nearest_by_ratio() -> None:
    ladder = ladder_of(Schedule.parse("4->1"), recipe(1.0, 2.0, 4.0, 8.0), "s")
    assert ladder.rungs == (1.0, 2.0, 4.0)
    # 4, 3.4, 2.8, 2.2, 1.6, 1: between 4 and 2 the border is 2.828, between 2 and 1 it is 1.414
    assert [ladder.at(step, 6) for step in range(1, 7)] == [4, 4, 2, 2, 2, 1]
    assert ladder.at(7, 6) == 1  # batches are read ahead of the last step


def test_a_number_or_nothing_is_one_rung() -> None:
    assert ladder_of(None, recipe(2.0, 1.0), "s").rungs == (2.0,)
    assert ladder_of(Schedule.parse(1), recipe(2.0, 1.0), "s").rungs == (1.0,)
    with pytest.raises(ConfigError, match="serves temperature 2,1, this run asks for 3"):
        ladder_of(Schedule.parse("3"), recipe(2.0, 1.0), "s")


@pytest.mark.parametrize(("text", "flag"), [("4->1", "4,2,1"), ("1->3", "1,1.732,3"), ("2->1", "2,1")])
def test_a_store_that_lacks_an_end_is_refused_with_the_flag(text: str, flag: str) -> None:
    with pytest.raises(
        ConfigError, match=f"s.zarr serves temperature 1.5, .*type `logitstore build --temperature {flag}`"
    ):
        ladder_of(Schedule.parse(text), recipe(1.5), "s.zarr")


def test_top_k_serves_temperatures_by_its_log_z_too() -> None:
    kept = recipe(1.0, select="top-k:8", log_z=(1.0, 2.0, 4.0))
    assert ladder_of(Schedule.parse("4->1"), kept, "s").rungs == (1.0, 2.0, 4.0)


def test_a_live_ladder_has_eight_rungs_in_equal_ratios() -> None:
    rungs = spaced(Schedule.parse("4->1"))
    assert (len(rungs), rungs[0], rungs[-1]) == (8, 4.0, 1.0)
    assert np.allclose(np.diff(np.log(rungs)), -math.log(4) / 7)
    assert (spaced(None), spaced(Schedule.parse(2))) == ((1.0,), (2.0,))


@pytest.mark.parametrize("live", [False, True])
def test_every_step_trains_on_the_targets_and_the_loss_of_its_own_temperature(
    tmp_path: Path, world: World, live: bool
) -> None:
    where: dict[str, Any] = (
        {"teacher": str(world.teacher), "select": "top-k:24"} if live else {"store": (str(world.store),)}
    )
    options = {"temperature": "4->1:linear", "batch_size": 6, "grad_accumulation_steps": 2, "learning_rate": 1e-12}
    _, steps = world.train(tmp_path / "o", iters=6, **options, **where)
    wanted = [4.0, 4, 2, 2, 2, 1]
    if not live:
        assert [step["temperature"] for step in steps] == wanted
    head = distill_kernels.split_head(load_model(world.student).model)
    if live:  # the rungs of a live teacher
        rungs = spaced(Schedule.parse("4->1"))
        world.build(tmp_path / "rungs.zarr", temperature=rungs, select="top-k:24")
        assert {step["temperature"] for step in steps} <= set(rungs)
    store = open_store(tmp_path / "rungs.zarr" if live else world.store)
    chosen = world.sequences()
    for step in steps:  # nothing is learned at this rate, and every batch is all documents
        t = step["temperature"]
        batch = collate(chosen, [store.get(s.token_ids, t) for s in chosen], Weighing(0.9, "error"))
        assert batch is not None
        _, kd, _ = batch_loss(head, loss_of(["kl"], store.manifest.recipe, t, "s"), batch)
        assert step["kd_loss"] == pytest.approx(kd.item(), rel=5e-3 if live else 1e-5)  # a batch's shape rounds


def test_a_plain_temperature_is_not_shown(tmp_path: Path, world: World) -> None:
    _, steps = world.train(tmp_path / "o", store=(str(world.store),), temperature=2.0)
    assert not any("temperature" in step or "taid_t" in step for step in steps)


def test_progressive_is_its_two_schedules_and_the_resolved_config_says_so(tmp_path: Path, world: World) -> None:
    options = {"store": (str(world.store),), "iters": 5}
    _, steps = world.train(tmp_path / "o", progressive=True, **options)
    _, apart = world.train(tmp_path / "p", temperature="4->1:linear", alpha="0.9->0:linear", **options)
    assert [step["loss"] for step in steps] == [step["loss"] for step in apart]
    assert [step["alpha"] for step in steps] == pytest.approx([0.9, 0.675, 0.45, 0.225, 0])
    resolved, typed = (json.loads((tmp_path / name / "distill_train.json").read_text()) for name in "op")
    assert resolved | {"out": ""} == typed | {"out": ""}
    assert (resolved["alpha"], resolved["temperature"], resolved["progressive"]) == (
        "0.9->0:linear", "4->1:linear", False,
    )  # fmt: skip


def test_progressive_starts_where_it_is_told(world: World) -> None:
    config = world.config(Path("o"), store=("s",), progressive=True, alpha=0.5, temperature=2.0)
    assert config.alpha_schedule == Schedule(0.5, 0.0)
    assert config.temperature_schedule == Schedule(2.0, 1.0)
    again = TrainConfig(**{**config.to_json(), "store": ("s",)})
    assert again.to_json() == config.to_json()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"temperature": "4->"}, "temperature is '4->', expected a number above 0, or two .*; type --temperature 1"),
        ({"temperature": "4->0"}, "temperature is 4->0, expected a number above 0; type --temperature 1"),
        ({"progressive": True, "alpha": "0.9->0.1"}, "--progressive is a schedule of alpha, and alpha is one itself"),
        ({"progressive": True, "temperature": "4->1"}, "and temperature is one itself, 4->1; type --temperature with"),
        ({"progressive": True, "alpha": 0.0}, "--progressive leads alpha .* alpha is 0.0; type --alpha 0.9 with it"),
        ({"loss": ("kl", "jsd", "kl=2")}, "loss names kl twice; type it once, with a weight, as in --loss kl=2"),
        ({"loss": ("taid", "taid:0.2")}, "loss names taid twice, and a run has one t; type --loss taid once"),
    ],
)
def test_what_cannot_move_says_what_to_type(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        TrainConfig("s", "d", "o", store=("s",), **options)


def test_a_store_of_one_temperature_refuses_a_schedule_before_the_student_is_loaded(
    tmp_path: Path, world: World
) -> None:
    world.build(tmp_path / "one.zarr")
    with pytest.raises(ConfigError, match=r"one.zarr serves temperature 1, .*--temperature 4,2,1`"):
        world.train(tmp_path / "o", store=(str(tmp_path / "one.zarr"),), progressive=True, student="nowhere")


def test_a_run_whose_temperature_or_t_moves_does_not_grow(world: World) -> None:
    plain = world.config(Path("o"), store=("s",))
    assert not plain.depends_on_iters and not replace(plain, temperature="2->2").depends_on_iters
    for options in ({"temperature": "4->1"}, {"progressive": True}, {"loss": ("kl", "taid=0.5")}):
        assert replace(plain, **options).depends_on_iters
