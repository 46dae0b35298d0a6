import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import distill_kernels
from distill_kernels import SparseKL

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map

from distill_trainer.batch_loss import batch_loss
from distill_trainer.batches import Batch, Weighing, collate
from distill_trainer.evaluate import evaluate
from distill_trainer.losses import loss_of
from distill_trainer.targets import Count
from distill_trainer.train import train
from logitstore.documents import read_documents
from logitstore.errors import ModelError
from logitstore.model import LoadedModel, load_model
from logitstore.sequences import TokenSequence, tokenize
from logitstore.store import open_store
from logitstore.teacher import Teacher
from tests.runs import World, make_world, write_jsonl
from tests.tiny import tiny_tokenizer


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


def batch_of(world: World, chosen: list[TokenSequence], alpha: float = 0.9, store: Path | None = None) -> Batch:
    targets = [open_store(store or world.store).get(s.token_ids) for s in chosen]
    batch = collate(chosen, targets, Weighing(alpha, "error"))
    assert batch is not None
    return batch


def gradient(student: LoadedModel, batch: Batch, losses: Any = None) -> tuple[float, dict[str, np.ndarray]]:
    """The loss of a batch and its gradient by parameter."""
    head = distill_kernels.split_head(student.model)
    student.model.unfreeze()
    step = nn.value_and_grad(student.model, lambda b: batch_loss(head, losses or SparseKL(), b))
    (loss, _, _), gradients = step(batch)
    return loss.item(), {name: np.array(g) for name, g in tree_flatten(gradients)}


def test_training_from_the_store_and_online_is_the_same_training(tmp_path: Path, world: World) -> None:
    options = {"iters": 10, "fine_tune_type": "full"}
    stored, from_store = world.train(tmp_path / "store", store=(str(world.store),), **options)
    live, online = world.train(tmp_path / "online", teacher=str(world.teacher), **options)
    assert np.allclose([m["loss"] for m in from_store], [m["loss"] for m in online], atol=1e-3)
    assert (stored.count.misses, live.count.hits) == (0, 0)
    assert stored.count.hits == live.count.misses == stored.trained_tokens

    teacher, store = Teacher(str(world.teacher)), open_store(world.store)
    recipe = store.manifest.recipe
    equal = []
    for sequence in world.sequences():  # alone, where the build ran them as one padded batch
        (record,) = teacher.records([sequence.token_ids], recipe)
        kept, asked = store.get(sequence.token_ids), recipe.read(record.records)
        assert kept is not None
        equal.append((kept.ids == asked.ids) & (kept.weights == asked.weights))
    assert np.concatenate(equal).mean() >= 0.999


@pytest.mark.parametrize("select", ["threshold:16", "top-k:384"])
def test_with_alpha_1_a_student_of_other_weights_overfits_to_a_kl_near_zero(
    tmp_path: Path, world: World, select: str
) -> None:
    data = write_jsonl(tmp_path / "two.jsonl", [{"text": "Ask once."}, {"text": "Learn it."}])
    world.build(tmp_path / "s.zarr", dataset=str(data), select=select)
    options = {"dataset": str(data), "fine_tune_type": "full", "learning_rate": 1e-2, "alpha": 1.0}
    _, steps = world.train(tmp_path / "o", store=(str(tmp_path / "s.zarr"),), iters=150, **options)
    assert steps[0]["kd_loss"] > 2
    assert steps[-1]["kd_loss"] < 0.02
    if select == "top-k:384":  # the whole vocabulary: what was learned is the teacher itself
        sequences = list(tokenize(read_documents(str(data)), tiny_tokenizer(), 512))
        students = {"student": load_model(tmp_path / "o")}
        assert evaluate(students, Teacher(str(world.teacher)), sequences, quiet=True)["student"].kl < 0.02


def test_with_alpha_1_no_label_changes_any_gradient(world: World) -> None:
    sequences, student = world.sequences()[:2], load_model(world.student)
    for alpha, same in ((1.0, True), (0.9, False)):
        batch = batch_of(world, sequences, alpha)
        relabelled = batch._replace(labels=(batch.labels + 100) % 384)
        before, after = (gradient(student, b)[1] for b in (batch, relabelled))
        assert all(np.array_equal(before[name], after[name]) for name in before) == same


@pytest.mark.parametrize("select", ["threshold:16", "top-k:8"])
def test_the_gradient_through_the_whole_student_is_that_of_finite_differences_in_float64(
    tmp_path: Path, world: World, select: str
) -> None:
    world.build(tmp_path / "s.zarr", select=select, temperature=(2.0,))
    losses = loss_of(["kl"], open_store(tmp_path / "s.zarr").manifest.recipe, 2.0, "s.zarr")
    student = load_model(world.student)
    batch = batch_of(world, world.sequences()[:2], 0.7, tmp_path / "s.zarr")
    loss, found = gradient(student, batch, losses)

    student.model.set_dtype(mx.float64)
    assert loss == pytest.approx(loss_in_float64(student, batch, select), rel=1e-5)
    rng = np.random.default_rng(0)
    for name, parameter in tree_flatten(student.model.parameters()):
        values, by_size = np.array(parameter), np.abs(found[name]).ravel().argsort()
        for place in (by_size[-1], by_size[-2], rng.integers(values.size)):
            ends = []
            for step in (1e-3, -1e-3):  # MLX's float64 has constants and sigmoids of float32: errors of 1e-8
                moved = values.copy()
                moved.flat[place] += step
                student.model.load_weights([(name, mx.array(moved, mx.float64))], strict=False)
                ends.append(loss_in_float64(student, batch, select))
            slope = (ends[0] - ends[1]) / 2e-3
            assert found[name].flat[place] == pytest.approx(slope, rel=3e-3, abs=5e-5), name
        student.model.load_weights([(name, parameter)], strict=False)


def loss_in_float64(student: LoadedModel, batch: Batch, select: str, t: float = 2.0) -> float:
    """alpha T² KL(p || softmax(z / T)) + (1 - alpha) CE, a mean over rows; top-k has a tail bucket."""
    with mx.stream(mx.cpu):
        logits = student.model(batch.tokens)
    z = np.array(logits.reshape(-1, logits.shape[-1]))[np.array(batch.rows)]
    assert z.dtype == np.float64
    rows = np.arange(len(z))
    log_q = z / t - np.log(np.exp(z / t).sum(axis=1, keepdims=True))
    ids, w = np.array(batch.ids), np.array(batch.weights, np.float64)
    kl = (w * (np.log(np.where(w > 0, w, 1)) - log_q[rows[:, None], ids])).sum(axis=1)
    if select.startswith("top-k"):
        tail, kept = np.array(batch.log_tail_mass, np.float64), np.exp(log_q[rows[:, None], ids]).sum(axis=1)
        kl += np.exp(tail) * (tail - np.log(1 - kept))
    ce = np.log(np.exp(z).sum(axis=1)) - z[rows, np.array(batch.labels)]
    kd_weight, ce_weight = np.array(batch.kd_weight), np.array(batch.ce_weight)
    return float((kd_weight * t * t * kl + ce_weight * ce).mean())


def test_how_documents_are_batched_does_not_change_their_mean_gradient(world: World) -> None:
    chosen, student = world.sequences()[:4], load_model(world.student)
    loss, together = gradient(student, batch_of(world, chosen))
    alone = [gradient(student, batch_of(world, [s])) for s in chosen]
    count = np.array([s.trained.sum() for s in chosen])
    assert len(set(count)) > 1  # so that three of them are padded when together
    assert loss == pytest.approx(sum(n * one for n, (one, _) in zip(count, alone, strict=True)) / count.sum(), rel=1e-5)
    for name, whole in together.items():
        parts = sum(n * g[name] for n, (_, g) in zip(count, alone, strict=True)) / count.sum()
        assert np.allclose(whole, parts, atol=1e-5 + 1e-4 * np.abs(whole).max()), name


def test_padding_and_untrained_positions_touch_neither_loss_nor_gradient(world: World) -> None:
    student, batch = load_model(world.student), batch_of(world, world.sequences()[:2])
    length = len(world.sequences()[0].trained)
    padded = np.array(batch.tokens)
    assert length < padded.shape[1]
    padded[0, length:] = 77
    before, after = gradient(student, batch), gradient(student, batch._replace(tokens=mx.array(padded)))
    assert before[0] == after[0]
    assert all(np.allclose(before[1][name], after[1][name], atol=1e-6) for name in before[1])


@pytest.mark.parametrize("policy", ["skip", "hard-only"])
def test_a_run_that_misses_everything_still_ends(tmp_path: Path, world: World, policy: str) -> None:
    other = write_jsonl(tmp_path / "other.jsonl", [{"text": "Nobody asked the teacher this."}])
    report, steps = world.train(tmp_path / "o", store=(str(world.store),), dataset=str(other), on_miss=policy)
    assert (report.count.hits, report.count.misses > 0) == (0, True)
    assert all(step["kd_loss"] is None for step in steps)
    assert all((step["loss"] is None) == (policy == "skip") for step in steps)
    assert report.trained_tokens == (0 if policy == "skip" else report.count.misses)


def test_the_kl_that_is_shown_is_that_of_the_positions_with_targets(world: World) -> None:
    chosen, student = world.sequences()[:2], load_model(world.student)
    targets = [open_store(world.store).get(chosen[0].token_ids), None]
    mixed = collate(chosen, targets, Weighing(0.9, "hard-only"))
    assert mixed is not None
    head = distill_kernels.split_head(student.model)
    _, shown, ce = batch_loss(head, SparseKL(), mixed)
    _, alone, _ = batch_loss(head, SparseKL(), batch_of(world, chosen[:1]))
    _, _, whole_ce = batch_loss(head, SparseKL(), batch_of(world, chosen))
    assert shown.item() == pytest.approx(alone.item(), rel=1e-5)
    assert ce.item() == pytest.approx(whole_ce.item(), rel=1e-5)


def test_every_step_is_one_json_object_and_the_resolved_config_lies_beside_it(tmp_path: Path, world: World) -> None:
    report, steps = world.train(tmp_path / "o", store=(str(world.store),))
    wanted = {"step", "loss", "kd_loss", "ce_loss", "hits", "misses", "tokens_per_second"}
    assert [step["step"] for step in steps] == [1, 2, 3]
    assert all(wanted <= step.keys() for step in steps)
    assert all(step["loss"] == pytest.approx(0.9 * step["kd_loss"] + 0.1 * step["ce_loss"]) for step in steps)
    config = json.loads((tmp_path / "o" / "distill_train.json").read_text())
    assert (config["on_miss"], config["temperature"], config["iters"]) == ("error", None, 3)
    summary = json.loads((tmp_path / "o" / "summary.json").read_text())
    assert summary["count"] == asdict(Count(hits=report.count.hits))


def test_the_same_seed_gives_the_same_losses_and_another_does_not(tmp_path: Path, world: World) -> None:
    runs = [
        [step["loss"] for step in world.train(tmp_path / str(i), store=(str(world.store),), seed=seed)[1]]
        for i, seed in enumerate((3, 3, 4))
    ]
    assert runs[0] == runs[1] != runs[2]


def test_a_student_whose_head_cannot_be_taken_apart_is_trained_on_whole_logits_and_the_run_says_so(
    tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, fused = world.train(tmp_path / "fused", store=(str(world.store),))
    monkeypatch.setattr(distill_kernels, "split_head", lambda model: distill_kernels.Head(model, "it is knotted"))
    said: list[str] = []
    train(world.config(tmp_path / "whole", store=(str(world.store),)), said.append)
    whole = [json.loads(line)["loss"] for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert whole == pytest.approx([step["loss"] for step in fused], rel=1e-5)
    assert [line for line in said if "whole logits" in line and "it is knotted" in line]


def test_ctrl_c_in_the_middle_of_a_step_saves_a_sound_student(
    tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def interrupted(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return batch_loss(*args)

    options = {"store": (str(world.store),), "fine_tune_type": "full"}
    world.train(tmp_path / "two", iters=2, **options)
    monkeypatch.setattr("distill_trainer.steps.batch_loss", interrupted)
    report, _ = world.train(tmp_path / "cut", iters=9, **options)
    assert (report.interrupted, report.steps) == (True, 2)
    two, cut = (mx.load(str(tmp_path / name / "model.safetensors")) for name in ("two", "cut"))
    assert all(tree_map(lambda a, b: bool(mx.array_equal(a, b)), two, cut).values())


def test_a_run_that_fails_before_its_first_step_takes_its_own_files_away_and_no_others(
    tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("distill_trainer.steps.batch_loss", failing)
    with pytest.raises(KeyboardInterrupt):
        world.train(tmp_path / "a", store=(str(world.store),), keep_layers=2)
    assert not (tmp_path / "a").exists()
    kept = tmp_path / "b" / "kept.zarr"
    with pytest.raises(KeyboardInterrupt):
        world.train(tmp_path / "b", store=(str(kept),), teacher=str(world.teacher), write_back=True)
    assert list((tmp_path / "b").iterdir()) == [kept]
    assert len(open_store(kept)) == 2


def test_a_loss_that_is_no_number_ends_the_run(tmp_path: Path, world: World) -> None:
    with pytest.raises(
        ModelError, match=r"the loss of step \d+ is nan on data.jsonl:\d.*; type --learning-rate below 1e\+30"
    ):
        world.train(tmp_path / "o", store=(str(world.store),), fine_tune_type="full", learning_rate=1e30)


def test_weights_that_the_last_step_made_no_numbers_are_no_result(tmp_path: Path, world: World) -> None:
    with pytest.raises(ModelError, match=r"after step 1 some weights are no finite numbers; type --learning-rate"):
        world.train(tmp_path / "o", store=(str(world.store),), iters=1, learning_rate=1e39)
    assert not (tmp_path / "o" / "adapters.safetensors").exists()
