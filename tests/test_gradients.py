from pathlib import Path
from typing import Any

from distill_kernels import SparseKL, split_head

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers

from distill_trainer.batch_loss import batch_loss
from distill_trainer.batches import Batch, Weighing, collate
from distill_trainer.gradients import checkpoint_layers, value_and_gradient
from distill_trainer.student import load_student, make_trainable
from logitstore.errors import ModelError
from logitstore.model import load_model
from logitstore.store import open_store
from tests.runs import World, gradient, make_world, write_jsonl
from tests.tiny import save_tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


def batches(world: World, *groups: tuple[int, ...], missing: int = 1) -> list[Batch]:
    """Batches of documents by their numbers; one document is not in the store."""
    store, found = open_store(world.store), []
    for numbers in groups:
        chosen = [world.sequences()[i] for i in numbers]
        targets = [None if i == missing else store.get(s.token_ids) for i, s in zip(numbers, chosen, strict=True)]
        batch = collate(chosen, targets, Weighing(0.9, "hard-only"))
        assert batch is not None
        found.append(batch)
    return found


def equal(one: dict[str, np.ndarray], other: dict[str, np.ndarray], atol: float = 1e-6) -> bool:
    return all(
        np.allclose(one[name], other[name], rtol=1e-4, atol=atol + 1e-4 * np.abs(one[name]).max()) for name in one
    )


def test_the_gradient_of_accumulated_batches_is_that_of_one_with_the_same_documents(world: World) -> None:
    model = load_model(world.student).model
    model.unfreeze()
    means, whole = gradient(model, batches(world, (0, 1, 2, 3, 4)))
    for groups in (((0, 1), (2, 3), (4,)), ((1,), (3, 0, 4), (2,))):
        found, accumulated = gradient(model, batches(world, *groups))
        assert np.allclose(found, means, rtol=1e-5)
        assert equal(whole, accumulated)


def test_eight_batches_of_one_document_are_one_batch_of_eight(world: World) -> None:
    model = load_model(world.student).model
    model.unfreeze()
    eight = (0, 1, 2, 3, 4, 5, 0, 3)
    (together,), alone = batches(world, eight), batches(world, *((number,) for number in eight))
    assert together.tokens.size > sum(batch.tokens.size for batch in alone)  # the one is padded, the eight are not
    means, whole = gradient(model, [together])
    found, accumulated = gradient(model, alone)
    assert np.allclose(found, means, rtol=1e-5)
    assert equal(whole, accumulated)


def test_a_student_in_float16_has_the_same_gradient_however_many_rows_a_batch_has(world: World) -> None:
    path = save_tiny_model(world.folder / "wide", seed=3, vocab_size=20_000, layers=1, tied=False)
    (batch,) = batches(world, (0, 1, 2, 3, 4, 5) * 8)
    assert len(batch.rows) > 1000  # 1 / 1,000 / 20,000 is nothing in float16
    found = []
    for dtype in (mx.float32, mx.float16):
        model: Any = load_model(path).model
        model.lm_head.weight += 0.5  # tokens have much in common; over all of them its gradient is 0
        model.set_dtype(dtype)
        model.freeze()
        mx.random.seed(0)
        linear_to_lora_layers(model, 1, {"rank": 4, "dropout": 0.0, "scale": 10.0})
        head = split_head(model)
        step = value_and_gradient(model, lambda losses, batch, head=head: batch_loss(head, losses, batch))
        means, gradients = step(SparseKL(), batch)
        flat = [np.array(g, np.float64).ravel() for _, g in tree_flatten(gradients)]
        found.append((np.array([mean.item() for mean in means]), np.concatenate(flat)))
    (truth, exact), (rounded, half) = found
    assert np.allclose(rounded, truth, rtol=0.01)
    assert np.linalg.norm(half - exact) < 0.03 * np.linalg.norm(exact)


def test_a_sum_that_float16_cannot_hold_is_taken_in_part(world: World) -> None:
    class Steep(nn.Module):
        def __init__(self) -> None:
            super().__init__()  # type: ignore[no-untyped-call]
            self.w = mx.array(1.0, mx.float16)

    (batch,) = batches(world, (0, 1, 2))
    model, share = Steep(), batch.kd_weight.sum().item() / len(batch.rows)
    step = value_and_gradient(model, lambda _, b: ((model.w * b.kd_weight.mean().astype(mx.float16)) * 20_000,))
    (loss,), gradients = step(None, batch)
    assert share * len(batch.rows) * 20_000 > 65_504 > share * 20_000
    assert [loss.item(), gradients["w"].item()] == pytest.approx([share * 20_000] * 2, rel=2e-3)


def test_no_pad_token_is_trained_though_it_is_the_token_that_ends_every_document(world: World) -> None:
    tokenizer, documents = tiny_tokenizer(), world.sequences()
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    (batch,) = batches(world, tuple(range(len(documents))))
    ends = np.flatnonzero(np.array(batch.labels) == tokenizer.pad_token_id)
    assert len(ends) == len(documents)  # mlx-lm's batches train one more, the first of the padding
    rows = [b * batch.tokens.shape[1] + t for b, s in enumerate(documents) for t in range(len(s.token_ids) - 1)]
    assert batch.rows.tolist() == rows


def test_a_run_of_two_batches_a_step_is_the_run_of_one_twice_as_large(tmp_path: Path, world: World) -> None:
    data = write_jsonl(tmp_path / "four.jsonl", [{"text": t} for t in ("One.", "Two and two.", "Three, 3, iii.", "4")])
    world.build(tmp_path / "s.zarr", dataset=str(data))
    options = {"store": (str(tmp_path / "s.zarr"),), "dataset": str(data), "iters": 6, "fine_tune_type": "full"}
    _, one = world.train(tmp_path / "one", batch_size=4, **options)
    _, two = world.train(tmp_path / "two", batch_size=2, grad_accumulation_steps=2, **options)
    for name in ("loss", "kd_loss", "ce_loss", "trained_tokens", "hits"):
        assert [step[name] for step in two] == pytest.approx([step[name] for step in one], rel=1e-4), name


def test_the_norm_is_logged_before_clipping_and_the_step_is_clipped(tmp_path: Path, world: World) -> None:
    options = {"store": (str(world.store),), "iters": 1, "fine_tune_type": "full", "batch_size": 6, "optimizer": "sgd"}
    _, steps = world.train(tmp_path / "o", max_grad_norm=0.01, learning_rate=1.0, **options)
    model = load_model(world.student).model
    model.unfreeze()
    found = gradient(model, batches(world, tuple(range(6)), missing=-1))[1]
    norm = np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in found.values()))
    assert steps[0]["grad_norm"] == pytest.approx(norm, rel=1e-4)
    before, after = (mx.load(str(folder / "model.safetensors")) for folder in (world.student, tmp_path / "o"))
    moved = np.sqrt(sum(((np.array(before[n], np.float64) - np.array(after[n])) ** 2).sum() for n in before))
    assert moved == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_layers_that_are_computed_twice_have_the_same_gradient_with_dropout_too(
    tmp_path: Path, world: World, kind: str
) -> None:
    found = []
    for twice in (False, True):
        dropout = {"rank": 4, "dropout": 0.5, "scale": 10.0}
        config = world.config(tmp_path, fine_tune_type=kind, lora_parameters=dropout, grad_checkpoint=twice, alpha=0.0)
        student = load_student(config)
        make_trainable(student, config)
        model = student.model
        if kind == "lora":  # lora_b is zero at first, and with it the gradient of lora_a
            model.load_weights(
                [(n, p + 0.1) for n, p in tree_flatten(model.trainable_parameters()) if n.endswith("lora_b")],
                strict=False,
            )
        found.append(gradient(model, batches(world, (0, 1), (2, 3))))
        assert (type(model.layers[0]).__mro__[1] is type(load_model(world.student).model.layers[0])) == twice
    assert np.allclose(found[0][0], found[1][0], rtol=1e-6)
    assert equal(found[0][1], found[1][1])


def test_computing_twice_touches_no_other_model_and_does_not_stack(world: World) -> None:
    student, teacher = load_model(world.student).model, load_model(world.teacher).model
    kind = type(teacher.layers[0])
    call = kind.__call__
    checkpoint_layers(student)
    twice = type(student.layers[0])
    checkpoint_layers(student)
    assert type(student.layers[0]) is twice and twice.__bases__ == (kind,)
    assert type(teacher.layers[0]) is kind and kind.__call__ is call
    with pytest.raises(ModelError, match="leave --grad-checkpoint out"):
        checkpoint_layers(nn.Linear(2, 2))


def test_computing_twice_takes_less_memory(tmp_path: Path) -> None:
    peaks, folder = [], save_tiny_model(tmp_path / "deep", layers=16)
    for twice in (False, True):
        model = load_model(folder).model
        model.train()
        if twice:
            checkpoint_layers(model)
        model.layers[0].unfreeze()  # the first: gradients go through all
        step = nn.value_and_grad(model, lambda tokens, model=model: model.model(tokens).sum())
        mx.eval(model.parameters())
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(step(mx.zeros((16, 128), mx.int32)))
        peaks.append(mx.get_peak_memory() - before)
    assert peaks[1] < 0.5 * peaks[0]


def test_a_gradient_that_is_no_number_ends_the_run_in_its_step(
    tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoiled(step: Any, batches: Any) -> Any:
        means, gradients = step(batches[0])
        gradients["model"]["norm"]["weight"] *= mx.inf
        return means, gradients

    monkeypatch.setattr("distill_trainer.parallel.mean_gradient", spoiled)
    options = {"store": (str(world.store),), "fine_tune_type": "full", "max_grad_norm": 1.0}
    with pytest.raises(ModelError, match=r"the gradient's norm of step 1 is inf on data.jsonl:\d"):
        world.train(tmp_path / "o", **options)
