from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import distill_kernels
from distill_kernels import SparseKL

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt
import pytest
from mlx.utils import tree_flatten

from distill_trainer.batch_loss import batch_loss
from distill_trainer.batches import Batch, Weighing, collate
from distill_trainer.gradients import mean_gradient
from distill_trainer.hidden import HiddenLoss, Projectors, distance, live_states, width_of
from distill_trainer.method import learner, with_methods, with_teacher
from logitstore.errors import ConfigError, IncompatibleStoreError, ModelError
from logitstore.model import load_model
from logitstore.sequences import TokenSequence
from logitstore.trace import traced
from tests.runs import World, make_world, write_jsonl
from tests.tiny import save_tiny_gpt2, save_tiny_model

PAIRS = ((5, 3), (2, 1))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A teacher of 6 layers, 64 wide; a student of 4, 32 wide."""
    world = make_world(tmp_path_factory.mktemp("world"), store=False)
    save_tiny_model(world.teacher, seed=1, layers=6, hidden=64)
    return world


def by_formula(kind: str, a: npt.NDArray[Any], b: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    a, b = a.astype(np.float64), b.astype(np.float64)
    if kind == "mse":
        return ((a - b) ** 2).mean(axis=-1)
    if kind == "l1":
        return np.abs(a - b).mean(axis=-1)
    return 1 - (a * b).sum(axis=-1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1))


def method_of(world: World, model: Any, kind: Any = "mse", weight: float = 0.5) -> HiddenLoss:
    teacher = load_model(world.teacher).model
    projectors = Projectors(PAIRS, 32, 64, seed=0)
    return HiddenLoss(kind, weight, PAIRS, model, live_states(teacher, PAIRS), projectors)


def batch_of(sequences: list[TokenSequence], method: HiddenLoss) -> Batch:
    """Cross-entropy alone beside the method."""
    weighing = Weighing(0.0, "hard-only")
    answers: Any = [sequence.trained for sequence in sequences]  # of whole documents: their lengths alone are read
    batch = with_teacher(collate(sequences, [None] * len(sequences), weighing), [method], answers)
    assert batch is not None
    return batch


def half_trained(sequences: list[TokenSequence]) -> list[TokenSequence]:
    """The first half of each is a prompt."""
    return [replace(s, trained=np.arange(len(s.trained)) >= len(s.trained) // 2) for s in sequences]


def step_of(model: Any, method: HiddenLoss) -> Any:
    head = distill_kernels.split_head(model)
    return nn.value_and_grad(
        learner(model, [method]), lambda batch: with_methods(partial(batch_loss, head, SparseKL()), [method], batch)
    )


@pytest.mark.parametrize("kind", ["mse", "cosine", "l1"])
def test_distances_are_their_formulas(kind: Any) -> None:
    rng = np.random.default_rng(0)
    a, b = (rng.normal(0, 3, (7, 40)).astype(np.float32) for _ in range(2))
    assert np.allclose(distance(kind, mx.array(a), mx.array(b)), by_formula(kind, a, b), rtol=1e-5)
    gradient = mx.grad(lambda a: distance(kind, a, mx.array(b)).sum())(mx.zeros((7, 40)))
    assert np.isfinite(np.array(gradient)).all()


@pytest.mark.parametrize("kind", ["mse", "cosine", "l1"])
def test_the_term_is_the_mean_over_pairs_and_trained_positions_alone(world: World, kind: Any) -> None:
    student, teacher = load_model(world.student).model, load_model(world.teacher).model
    method = method_of(world, student, kind)
    sequences = half_trained(world.sequences()[:3])
    batch = batch_of(sequences, method)
    found = with_methods(partial(batch_loss, distill_kernels.split_head(student), SparseKL()), [method], batch)

    rows = []
    for sequence in sequences:  # each alone, so without padding
        tokens = mx.array(sequence.token_ids[None, :-1])
        with traced(student, (1, 3)) as own, traced(teacher, (2, 5)) as theirs:
            student(tokens), teacher(tokens)
        for at in np.flatnonzero(sequence.trained):
            for t, s in PAIRS:
                matrix = np.array(method.module[f"teacher_{t}_student_{s}"].weight, np.float64)
                rows.append(by_formula(kind, matrix @ np.array(own[s][0, at], np.float64), np.array(theirs[t][0, at])))
    assert found[3].item() == pytest.approx(np.mean(rows), rel=1e-4)
    assert found[0].item() == pytest.approx(found[2].item() + 0.5 * np.mean(rows), rel=1e-4)


def test_prompt_and_padding_touch_nothing(world: World) -> None:
    student = load_model(world.student).model
    student.unfreeze()
    method = method_of(world, student)
    short, long = sorted(world.sequences(), key=lambda s: len(s.trained))[:: len(world.sequences()) - 1]
    nothing = replace(long, trained=np.zeros(len(long.trained), bool))
    alone, padded = batch_of([short], method), batch_of([nothing, short], method)
    assert padded.tokens.shape[1] > alone.tokens.shape[1]
    step = step_of(student, method)
    (means, gradient), (found, other) = step(alone), step(padded)
    assert np.allclose(means, found, rtol=1e-5)
    for (name, one), (_, two) in zip(tree_flatten(gradient), tree_flatten(other), strict=True):
        assert np.allclose(one, two, rtol=1e-3, atol=1e-5), name


def test_positions_without_an_answer_are_left_out_and_accumulation_is_one_batch(world: World) -> None:
    student = load_model(world.student).model
    student.unfreeze()
    method = method_of(world, student)
    sequences = world.sequences()[:4]

    def without_second(chosen: list[TokenSequence]) -> Batch:
        batch = batch_of(chosen, method)
        lost = np.array(batch.rows) // batch.tokens.shape[1] == [s.where for s in chosen].index(sequences[1].where)
        (beside,) = batch.beside
        arrays = mx.where(mx.array(lost)[:, None, None], 1000, beside.arrays[0])
        return batch._replace(beside=(beside._replace(weights=mx.array(~lost, mx.float32), arrays=(arrays,)),))

    step = step_of(student, method)
    whole, gradient = step(without_second(sequences))
    apart = [without_second(sequences[:2]), batch_of(sequences[2:], method)]
    means, accumulated = mean_gradient(step, apart)
    assert np.allclose(whole, means, rtol=1e-5)
    for (name, one), (_, two) in zip(tree_flatten(gradient), tree_flatten(accumulated), strict=True):
        assert np.allclose(one, two, rtol=1e-3, atol=1e-5), name
    kept = step(batch_of([sequences[i] for i in (0, 2, 3)], method))[0]
    assert whole[3].item() == pytest.approx(kept[3].item(), rel=1e-5)
    n, lost = (sum(int(s.trained.sum()) for s in part) for part in (sequences, sequences[1:2]))
    assert whole[0].item() == pytest.approx(whole[2].item() + 0.5 * kept[3].item() * (n - lost) / n, rel=1e-5)


@pytest.mark.parametrize("kind", ["mse", "cosine", "l1"])
def test_the_gradient_is_that_of_finite_differences_through_the_whole_student(world: World, kind: Any) -> None:
    student = load_model(world.student).model
    student.unfreeze()
    method = method_of(world, student, kind, weight=1.0)
    batch = batch_of(world.sequences()[:1], method)
    gradient = dict(tree_flatten(step_of(student, method)(batch)[1]))
    parameters = dict(tree_flatten(learner(student, [method]).trainable_parameters()))
    loss = partial(batch_loss, distill_kernels.split_head(student), SparseKL())
    rng = np.random.default_rng(3)
    width = 2e-4 if kind == "l1" else 1e-3  # l1 has corners, of which more lie in a wider step
    for name in ("student.model.layers.0.mlp.up_proj.weight", "hidden.teacher_5_student_3.weight"):
        values, direction = parameters[name], mx.array(rng.normal(0, 1, parameters[name].shape).astype(np.float32))
        found = []
        for step in (width, -width):
            learner(student, [method]).load_weights([(name, values + step * direction)], strict=False)
            found.append(with_methods(loss, [method], batch)[0].item())
        learner(student, [method]).load_weights([(name, values)], strict=False)
        expected = (gradient[name] * direction).sum().item()
        # float32 losses of about 10, 2e-3 or 4e-4 of a slope apart: rounding is about 1e-6 / 4e-4
        assert (found[0] - found[1]) / (2 * width) == pytest.approx(expected, rel=2e-2, abs=5e-3), name


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_run_lowers_the_hidden_loss_trains_its_projectors_and_keeps_them_apart(
    tmp_path: Path, world: World, kind: Any
) -> None:
    data = write_jsonl(tmp_path / "two.jsonl", [{"text": "One."}, {"text": "Two, too."}])
    options = {"teacher": str(world.teacher), "hidden_loss": "mse", "hidden_weight": 1.0, "layer_map": "5:3,2:1"}
    options |= {"fine_tune_type": kind, "iters": 10, "dataset": str(data), "learning_rate": 3e-3}
    _, steps = world.train(tmp_path / "o", **options)
    assert steps[-1]["hidden_loss"] < 0.9 * steps[0]["hidden_loss"]
    own = mx.load(str(tmp_path / "o" / "projectors.safetensors"))
    assert own.keys() == {"hidden.teacher_5_student_3.weight", "hidden.teacher_2_student_1.weight"}
    drawn = Projectors(PAIRS, 32, 64, seed=0)
    for name, values in own.items():
        assert values.shape == (64, 32)
        assert not mx.allclose(values, drawn[name.split(".")[1]].weight, atol=1e-4)
    saved = load_model(tmp_path / "o") if kind == "full" else load_model(world.student, adapter_path=tmp_path / "o")
    assert not any("teacher" in name for name, _ in tree_flatten(saved.model.parameters()))


def test_a_run_that_goes_on_is_the_run_that_never_stopped(tmp_path: Path, world: World) -> None:
    options = {"teacher": str(world.teacher), "hidden_loss": "cosine", "save_every": 2, "grad_checkpoint": True}
    options |= {"lora_parameters": {"rank": 4, "dropout": 0.2, "scale": 10.0}}
    _, whole = world.train(tmp_path / "whole", iters=4, **options)
    world.train(tmp_path / "parts", iters=2, **options)
    _, parts = world.train(tmp_path / "parts", iters=4, resume=True, **options)
    names = ("loss", "kd_loss", "ce_loss", "hidden_loss")
    assert [[step[name] for name in names] for step in parts] == [[step[name] for name in names] for step in whole]
    one, other = (mx.load(str(tmp_path / run / "projectors.safetensors")) for run in ("whole", "parts"))
    assert all(mx.array_equal(one[name], other[name]) for name in one) and one
    (tmp_path / "parts" / "checkpoints" / "0000004" / "projectors.safetensors").unlink()
    with pytest.raises(ModelError, match=r"projectors.safetensors cannot be read: .*; remove .*0000004 to go on"):
        world.train(tmp_path / "parts", iters=6, resume=True, **options)


def test_models_as_wide_need_no_projector(tmp_path: Path) -> None:
    world = make_world(tmp_path / "w", store=False)
    assert width_of(load_model(world.teacher).model) == 32
    _, steps = world.train(tmp_path / "o", teacher=str(world.teacher), hidden_loss="l1", iters=1)
    assert steps[0]["hidden_loss"] > 0
    assert not (tmp_path / "o" / "projectors.safetensors").exists()


def test_what_cannot_be_is_refused_in_one_line(tmp_path: Path, world: World) -> None:
    teacher = {"teacher": str(world.teacher)}
    for options, message in (
        (
            {**teacher, "hidden_loss": "mae"},
            r"hidden_loss is 'mae', expected one of mse\|cosine\|l1; type --hidden-loss",
        ),
        ({**teacher, "hidden_loss": "mse", "hidden_weight": 0.0}, "hidden_weight is 0.0, expected a number above 0"),
        ({**teacher, "hidden_weight": 0.3}, "--hidden-weight weighs a loss that is not given; type --hidden-loss mse"),
        ({**teacher, "hidden_loss": "mse", "alpha": 0.0}, "--hidden-loss learns from a teacher, and none is read with"),
        ({**teacher, "layer_map": "1:1"}, "--layer-map says whose layers are compared, and nothing compares them"),
        ({**teacher, "hidden_loss": "mse", "layer_map": "1"}, "layer_map is '1', which names no layers"),
        ({**teacher, "hidden_loss": "mse", "layer_map": "6:3"}, r"names 6:3 .* the teacher has layers 0 to 5; type"),
    ):
        with pytest.raises(ConfigError, match=message):
            world.train(tmp_path / "o", **options)
        assert not (tmp_path / "o").exists()


def test_a_store_of_hidden_states_teaches_as_the_live_teacher_does_and_misses_are_left_out(
    tmp_path: Path, world: World
) -> None:
    world.build(tmp_path / "s.zarr", hidden_layers=(2, 5))
    options = {"hidden_loss": "mse", "layer_map": "5:3,2:1", "iters": 2, "batch_size": 3}
    _, live = world.train(tmp_path / "live", teacher=str(world.teacher), **options)
    _, stored = world.train(tmp_path / "stored", store=(str(tmp_path / "s.zarr"),), **options)
    for one, other in zip(live, stored, strict=True):  # a byte a number on disk
        assert other["hidden_loss"] == pytest.approx(one["hidden_loss"], rel=2e-2)

    world.build(tmp_path / "part.zarr", hidden_layers=(2, 5), limit=3)
    part = {**options, "store": (str(tmp_path / "part.zarr"),), "batch_size": 6, "iters": 1}
    _, (hard,) = world.train(tmp_path / "hard", on_miss="hard-only", **part)
    _, (skip,) = world.train(tmp_path / "skip", on_miss="skip", **part)
    assert hard["misses"] == skip["misses"] > 0
    assert hard["hidden_loss"] == pytest.approx(skip["hidden_loss"], rel=1e-5)
    _, (asked,) = world.train(tmp_path / "asked", teacher=str(world.teacher), **part)
    _, (whole,) = world.train(tmp_path / "whole", **part | {"store": (str(tmp_path / "s.zarr"),)})
    assert asked["hidden_loss"] == pytest.approx(whole["hidden_loss"], rel=1e-3)


@pytest.mark.parametrize("why", ["too few places", "no numbers"])
@pytest.mark.parametrize("term", ["hidden", "attention"])
def test_a_document_that_the_live_teacher_does_not_answer_is_left_out(tmp_path: Path, term: str, why: str) -> None:
    world = make_world(tmp_path / "world", ["A short one.", "This one is long: 0123456789 0123456789."], store=False)
    short, long = world.sequences()
    if why == "too few places":
        save_tiny_gpt2(world.teacher, places=len(short.trained))
    else:
        save_tiny_model(world.teacher, tied=False)
        weights = dict(mx.load(str(world.teacher / "model.safetensors")))
        only = set(long.token_ids[:-1].tolist()) - set(short.token_ids.tolist())
        weights["model.embed_tokens.weight"][mx.array(list(only))] = mx.nan
        mx.save_safetensors(str(world.teacher / "model.safetensors"), weights)
    kind = {f"{term}_loss": "mse", "layer_map": "0:0", "on_miss": "hard-only", "teacher": str(world.teacher)}
    _, (both,) = world.train(tmp_path / "both", iters=1, **kind)
    write_jsonl(world.data, [{"text": "A short one."}])
    _, (alone,) = world.train(tmp_path / "alone", iters=1, **kind)
    assert both["failed"] == len(long.trained) and alone["failed"] == 0
    assert both[f"{term}_loss"] == pytest.approx(alone[f"{term}_loss"], rel=1e-4)
    write_jsonl(world.data, [{"text": "This one is long: 0123456789 0123456789."}])
    _, (nobody,) = world.train(tmp_path / "nobody", iters=1, **kind)
    assert nobody[f"{term}_loss"] is None and nobody["loss"] == pytest.approx(nobody["ce_loss"])


def test_a_store_that_lacks_the_layers_is_refused_with_the_flag_that_keeps_them(tmp_path: Path, world: World) -> None:
    world.build(tmp_path / "none.zarr")
    world.build(tmp_path / "s.zarr", hidden_layers=(2, 5))
    for store, layer_map, message in (
        ("none.zarr", "5:3", r"none.zarr keeps no hidden states, .* `logitstore build --hidden-layers 6,12`"),
        ("s.zarr", "4:3", r"layer 4, and the store keeps layers 2,5; .*`logitstore build --hidden-layers 4` for"),
        ("s.zarr", "auto", r"type --layer-map 2:S,5:S \(TEACHER:STUDENT\), S from 0 to 3"),
    ):
        with pytest.raises((ConfigError, IncompatibleStoreError), match=message):
            world.train(tmp_path / "o", store=(str(tmp_path / store),), hidden_loss="mse", layer_map=layer_map, iters=1)
