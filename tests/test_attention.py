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
from mlx_lm.models import gemma2, gpt_oss, qwen3

from distill_trainer.attention import AttentionLoss, distance
from distill_trainer.attention_maps import attention_maps, mean_map, require_maps
from distill_trainer.batch_loss import batch_loss
from distill_trainer.batches import Batch, Weighing, collate
from distill_trainer.method import with_methods, with_teacher
from logitstore.errors import ConfigError, ModelError
from logitstore.model import load_model
from logitstore.sequences import TokenSequence
from tests.runs import World, make_world, write_jsonl
from tests.tiny import save_tiny_model

TOKENS = mx.array([[5, 9, 260, 3, 8], [7, 7, 1, 0, 2]])
PAIRS = ((5, 3), (2, 1))
Array = npt.NDArray[Any]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A teacher of 6 layers, 64 wide; a student of 4, 32 wide."""
    world = make_world(tmp_path_factory.mktemp("world"), store=False)
    save_tiny_model(world.teacher, seed=1, layers=6, hidden=64)
    return world


def llama_map(model: Any, number: int) -> Array:
    """Of the tiny llama's layer, in NumPy float64 from its weights: mean over heads of softmax(q k^T / sqrt(d))."""
    hidden = model.model.embed_tokens(TOKENS)
    for layer in model.layers[:number]:
        hidden = layer(hidden, "causal")
    layer = model.layers[number]
    x = np.array(layer.input_layernorm(hidden), np.float64)
    heads = []
    for projection, count in ((layer.self_attn.q_proj, 4), (layer.self_attn.k_proj, 2)):
        y = x @ np.array(projection.weight, np.float64).T
        y = y.reshape(*y.shape[:2], count, -1).transpose(0, 2, 1, 3)
        half = y.shape[-1] // 2  # rotary embedding: the halves are the two coordinates
        angles = np.arange(y.shape[2])[:, None] * 10000.0 ** (-np.arange(half) / half)
        a, b, cos, sin = y[..., :half], y[..., half:], np.cos(angles), np.sin(angles)
        heads.append(np.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1))
    q, k = heads[0], np.repeat(heads[1], 2, axis=1)
    scores = q @ k.transpose(0, 1, 3, 2) / np.sqrt(q.shape[-1])
    scores = np.where(np.tril(np.ones(scores.shape[-2:], bool)), scores, -np.inf)
    exp = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return (exp / exp.sum(axis=-1, keepdims=True)).mean(axis=1)


def method_of(world: World, model: Any, kind: Any = "mse", weight: float = 0.5) -> AttentionLoss:
    return AttentionLoss(kind, weight, PAIRS, model, load_model(world.teacher).model)


def batch_of(sequences: list[TokenSequence], method: AttentionLoss) -> Batch:
    """Cross-entropy alone beside the method."""
    nobody: list[None] = [None] * len(sequences)
    answers: Any = [sequence.trained for sequence in sequences]  # of whole documents: their lengths alone are read
    batch = with_teacher(collate(sequences, nobody, Weighing(0.0, "hard-only")), [method], answers)
    assert batch is not None
    return batch


def test_maps_are_the_softmax_that_the_weights_say_and_the_model_gives_what_it_gave(world: World) -> None:
    model = load_model(world.student).model
    logits, kind = np.array(model(TOKENS)), type(model.layers[0].self_attn)
    with attention_maps(model, (0, 3)) as found:
        assert np.array_equal(model(TOKENS), logits)
    assert found.keys() == {0, 3}
    for number, maps in found.items():
        assert np.allclose(maps, llama_map(model, number), atol=1e-5)
    assert all(type(layer.self_attn) is kind for layer in model.layers)


def test_every_form_of_mask_is_applied() -> None:
    rng = np.random.default_rng(0)
    queries, keys = (mx.array(rng.normal(size=(1, h, 4, 8)).astype(np.float32)) for h in (4, 2))
    seen = mx.array(np.tril(np.ones((4, 4), bool)))
    causal = mean_map(queries, keys, 0.3, "causal")
    assert mx.array_equal(causal, mean_map(queries, keys, 0.3, seen))
    assert mx.allclose(causal, mean_map(queries, keys, 0.3, mx.where(seen, 0.0, -mx.inf)))
    assert causal[0, 0, 1:].sum().item() == 0
    whole = mean_map(queries, keys, 0.3, None)
    scores = np.exp(0.3 * np.einsum("hqd,hkd->hqk", queries[0], np.repeat(keys[0], 2, axis=0)))
    assert np.allclose(whole[0], (scores / scores.sum(axis=-1, keepdims=True)).mean(axis=0), atol=1e-6)


def test_norms_of_queries_and_keys_are_in_the_maps() -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 32, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "head_dim": 8, "vocab_size": 300, "max_position_embeddings": 64}
    args = {"model_type": "qwen3", "rms_norm_eps": 1e-5, "rope_theta": 1e4, "tie_word_embeddings": True}
    model = qwen3.Model(qwen3.ModelArgs.from_dict(sizes | args))
    require_maps(model, (0, 1))
    with attention_maps(model, (1,)) as found:
        model(TOKENS)
        before = np.array(found[1])
        model.layers[1].self_attn.q_norm.weight *= 0  # all scores are 0: a position attends to all before it alike
        model(TOKENS)
    uniform = np.tril(np.ones((5, 5))) / np.arange(1, 6)[:, None]
    assert np.allclose(found[1], uniform, atol=1e-6) and not np.allclose(before, uniform, atol=1e-3)


def by_formula(kind: str, a: Array, b: Array) -> Array:
    a, b, visible = a.astype(np.float64), b.astype(np.float64), (b > 0).sum(axis=-1)
    if kind == "mse":
        return ((a - b) ** 2).sum(axis=-1) / visible
    ratio = np.where(b > 0, b, 1) / np.maximum(np.where(b > 0, a, 1), 1e-9)
    return np.where(b > 0, b * np.log(ratio), 0).sum(axis=-1)


@pytest.mark.parametrize("kind", ["mse", "kl"])
def test_distances_are_their_formulas_and_have_gradients_at_zeros(kind: Any) -> None:
    rng = np.random.default_rng(0)
    a, b = (np.tril(rng.random((6, 6))).astype(np.float32) for _ in range(2))
    a, b = (x / x.sum(axis=-1, keepdims=True) for x in (a, b))
    a[3, 1] = 0
    visible = mx.arange(1, 7)
    assert np.allclose(distance(kind, mx.array(a), mx.array(b), visible), by_formula(kind, a, b), rtol=1e-5)
    gradient = mx.grad(lambda a: distance(kind, a, mx.array(b), visible).sum())(mx.array(a))
    assert np.isfinite(np.array(gradient)).all()


@pytest.mark.parametrize("kind", ["mse", "kl"])
def test_the_term_is_the_mean_over_pairs_and_trained_positions_however_they_are_padded(world: World, kind: Any) -> None:
    student, teacher = load_model(world.student).model, load_model(world.teacher).model
    method = method_of(world, student, kind)
    sequences = world.sequences()[:3]
    for sequence in sequences:
        sequence.trained[: len(sequence.trained) // 2] = False  # a prompt
    rows = []
    for sequence in sequences:
        with attention_maps(student, (1, 3)) as own, attention_maps(teacher, (2, 5)) as theirs:
            student(mx.array(sequence.token_ids[None, :-1])), teacher(mx.array(sequence.token_ids[None, :-1]))
        for at in np.flatnonzero(sequence.trained):
            rows += [by_formula(kind, *(np.array(m[0, at]) for m in (own[s], theirs[t]))) for t, s in PAIRS]
    loss = partial(batch_loss, distill_kernels.split_head(student), SparseKL())
    found = with_methods(loss, [method], batch_of(sequences, method))
    assert found[3].item() == pytest.approx(np.mean(rows), rel=1e-3)
    assert found[0].item() == pytest.approx(found[2].item() + 0.5 * np.mean(rows), rel=1e-4)


@pytest.mark.parametrize("kind", ["mse", "kl"])
def test_the_gradient_is_that_of_finite_differences_through_the_whole_student(world: World, kind: Any) -> None:
    student = load_model(world.student).model
    student.unfreeze()
    method = method_of(world, student, kind, weight=20.0)
    batch = batch_of(world.sequences()[:1], method)
    loss = partial(batch_loss, distill_kernels.split_head(student), SparseKL())
    gradient = dict(tree_flatten(nn.value_and_grad(student, lambda: with_methods(loss, [method], batch)[0])()[1]))
    name = "model.layers.1.self_attn.q_proj.weight"
    values = student.model.layers[1].self_attn.q_proj.weight
    direction, found = mx.array(np.random.default_rng(3).normal(size=values.shape).astype(np.float32)), []
    for step in (1e-3, -1e-3):
        student.load_weights([(name, values + step * direction)], strict=False)
        found.append(with_methods(loss, [method], batch)[0].item())
    # float32 losses of about 10, 2e-3 of a slope apart: rounding is about 1e-6 / 2e-3
    assert (found[0] - found[1]) / 2e-3 == pytest.approx((gradient[name] * direction).sum().item(), rel=2e-2, abs=5e-3)


def test_a_run_lowers_the_attention_loss(tmp_path: Path, world: World) -> None:
    data = write_jsonl(tmp_path / "two.jsonl", [{"text": "One and one."}, {"text": "Two, too."}])
    options = {"teacher": str(world.teacher), "attention_loss": "kl", "attention_weight": 5.0, "dataset": str(data)}
    _, steps = world.train(tmp_path / "o", iters=10, learning_rate=3e-3, layer_map="skip:2", **options)
    assert steps[-1]["attention_loss"] < 0.9 * steps[0]["attention_loss"]
    assert not (tmp_path / "o" / "projectors.safetensors").exists()


def test_models_whose_attention_cannot_be_read_are_refused_by_name() -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 32, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "head_dim": 8, "vocab_size": 300}
    soft_capped = gemma2.Model(gemma2.ModelArgs.from_dict(sizes | {"model_type": "gemma2", "rms_norm_eps": 1e-5}))
    with pytest.raises(ModelError, match=r"the attention of mlx_lm.models.gemma2.TransformerBlock \(layer 0\) cannot"):
        require_maps(soft_capped, (0,))
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 8, "model_type": "gpt_oss"}
    sinks = gpt_oss.Model(gpt_oss.ModelArgs.from_dict(sizes | experts))
    with pytest.raises(ModelError, match=r"gpt_oss.AttentionBlock has attention sinks, .* leave --attention-loss out"):
        require_maps(sinks, (1,))
    with pytest.raises(ModelError, match="has no plain list of layers"):
        require_maps(nn.Linear(2, 2), (0,))


def test_what_cannot_be_is_refused_in_one_line(world: World, tmp_path: Path) -> None:
    teacher = {"teacher": str(world.teacher), "attention_loss": "kl"}
    for options, message in (
        ({**teacher, "attention_loss": "cosine"}, r"attention_loss is 'cosine', expected one of mse\|kl; type"),
        ({"store": ("s.zarr",), "attention_loss": "kl"}, "no store keeps that; type --teacher T without --store"),
        ({**teacher, "store": ("s.zarr",)}, "no store keeps that; type --teacher T without --store"),
        ({**teacher, "grad_checkpoint": True}, "inside of layers that --grad-checkpoint computes twice; leave one"),
        ({**teacher, "attention_weight": float("nan")}, "attention_weight is nan, expected a number above 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            world.config(tmp_path / "o", **options)
