import math
from pathlib import Path
from typing import Any

import distill_kernels  # noqa: F401  loads the BLAS before MLX

import mlx.core as mx
import numpy as np
import pytest

from distill_trainer.optimizer import learning_rate_schedule, make_optimizer
from logitstore.errors import ConfigError
from tests.runs import World, make_world

NAMES = ("adam", "adamw", "muon", "sgd", "adafactor")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


def rates(config: dict[str, Any], steps: int) -> list[float]:
    schedule = learning_rate_schedule(config)
    return [float(schedule(mx.array(step, mx.uint64))) for step in range(steps)]


def test_a_cosine_after_a_warm_up_is_its_formula() -> None:
    found = rates({"name": "cosine_decay", "arguments": ["1e-2", 8, 1e-3], "warmup": 4, "warmup_init": "1e-4"}, 16)
    rising = [1e-4 + (1e-2 - 1e-4) * step / 4 for step in range(5)]
    falling = [1e-3 + (1e-2 - 1e-3) * (1 + math.cos(math.pi * min(i, 8) / 8)) / 2 for i in range(11)]
    assert found == pytest.approx(rising + falling, rel=1e-5)


@pytest.mark.parametrize("warmup", [0, 4])
def test_wsd_warms_up_stays_and_decays_to_its_end(warmup: int) -> None:
    found = rates({"name": "wsd", "arguments": [1.0, 6, 5, 0.5], "warmup": warmup}, 20)
    rising = [step / 4 for step in range(5)] if warmup else []
    whole = rising + [1.0] * 6 + [1.0, 0.9, 0.8, 0.7, 0.6] + [0.5] * 9
    assert found == pytest.approx(whole[:20], rel=1e-5)


def test_the_rate_of_each_step_is_in_the_metrics(tmp_path: Path, world: World) -> None:
    config = {"name": "linear_schedule", "arguments": [1e-3, 0.0, 4]}
    _, steps = world.train(tmp_path / "o", store=(str(world.store),), lr_schedule=config, iters=5)
    assert [step["learning_rate"] for step in steps] == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4, 0], abs=1e-9)


@pytest.mark.parametrize(("name", "decay"), [("adam", 0.0), ("adamw", 0.1)])
def test_adam_and_adamw_correct_their_bias(name: str, decay: float) -> None:
    config = {name: {"weight_decay": decay, "eps": "1e-6", "betas": [0.8, 0.9]}} if decay else {}
    b1, b2, eps = (0.8, 0.9, 1e-6) if decay else (0.9, 0.999, 1e-8)
    rng = np.random.default_rng(0)
    w, m, v = rng.normal(size=9), np.zeros(9), np.zeros(9)
    parameters, optimizer = {"w": mx.array(w, mx.float32)}, make_optimizer(name, config, 0.01, None)
    for step in range(1, 4):
        g = rng.normal(size=9)
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        w = w * (1 - 0.01 * decay) - 0.01 * (m / (1 - b1**step)) / (np.sqrt(v / (1 - b2**step)) + eps)
        parameters = optimizer.apply_gradients({"w": mx.array(g, mx.float32)}, parameters)
    assert np.allclose(parameters["w"], w, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_learns_and_goes_on_exactly(tmp_path: Path, world: World, name: str) -> None:
    rate = {"muon": 1e-2, "sgd": 1e-2, "adafactor": 1e-2}.get(name, 3e-3)
    options = {"store": (str(world.store),), "batch_size": 6, "optimizer": name, "learning_rate": rate}
    options |= {"optimizer_config": {"sgd": {"momentum": 0.9}}, "save_every": 4, "fine_tune_type": "full"}
    _, whole = world.train(tmp_path / "whole", iters=12, **options)
    world.train(tmp_path / "cut", iters=4, **options)
    _, cut = world.train(tmp_path / "cut", iters=12, resume=True, **options)
    assert whole[-1]["loss"] < 0.95 * whole[0]["loss"]
    assert [step["loss"] for step in cut] == [step["loss"] for step in whole]


def test_adafactor_takes_the_learning_rate_of_the_run() -> None:
    moved = []
    for rate in (1e-3, 2e-3):
        optimizer, w = make_optimizer("adafactor", {}, rate, None), {"w": mx.ones((4, 4))}
        moved.append(1 - optimizer.apply_gradients({"w": mx.ones((4, 4))}, w)["w"])
    assert np.allclose(2 * moved[0], moved[1], rtol=1e-3)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"name": "lion"}, r"optimizer is lion; type --optimizer adam\|adamw"),
        ({"configs": {"lr": 1}}, "has the key 'lr', expected an optimizer's name"),
        ({"configs": {"adam": {"beta": 1}}}, "optimizer_config of adam is .*expected some of the keys betas, eps"),
        ({"configs": {"adam": {"eps": "small"}}}, "optimizer_config of adam .*small.*; write other numbers"),
        ({"configs": {"adam": {"betas": [2, 2]}}}, "optimizer_config of adam .*; write other numbers"),
        ({"configs": {"adam": {"betas": [0.9]}}}, "optimizer_config of adam .*; write other numbers"),
        ({"name": "muon", "configs": {"muon": {"ns_steps": 2.5}}}, "optimizer_config of muon .*; write other numbers"),
        ({"configs": {"adam": 3}}, "optimizer_config of adam is 3, expected some of the keys"),
        ({"name": "adafactor", "configs": {"adafactor": {"relative_step": True}}}, "relative_step makes adafactor"),
        (
            {"lr_schedule": {"name": "cosine"}},
            "has the name 'cosine', expected one of cosine_decay, .*wsd; write as in",
        ),
        ({"lr_schedule": {"name": "wsd", "warm": 3}}, "lr_schedule has the key 'warm', which is not known"),
        ({"lr_schedule": {"name": "wsd"}}, "arguments is no list of numbers; write as in"),
        ({"lr_schedule": {"name": "wsd", "arguments": [1e-3]}}, "lr_schedule is .*missing .*; write as in"),
        ({"lr_schedule": {"name": "cosine_decay", "arguments": [1e-3, 0]}}, "lr_schedule is .*; write as in"),
        ({"lr_schedule": {"name": "cosine_decay", "arguments": [-1, 5]}}, "lr_schedule is .*; write as in"),
        ({"lr_schedule": {"name": "wsd", "arguments": [1, 5, 5], "warmup": -1}}, "warmup is no number of steps"),
        ({"lr_schedule": {"name": "wsd", "arguments": ["x", 5, 5]}}, "lr_schedule is .*'x'; write as in"),
    ],
)
def test_what_cannot_be_used_is_told_in_one_line(changed: dict[str, Any], expected: str) -> None:
    usual = {"name": "adam", "configs": {}, "learning_rate": 1e-3, "lr_schedule": None}
    with pytest.raises(ConfigError, match=expected) as caught:
        make_optimizer(**usual | changed)
    assert "\n" not in str(caught.value)
