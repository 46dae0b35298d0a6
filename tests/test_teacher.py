"""The targets of position t are those of predicting token t + 1: against a llama written again in NumPy float64."""

import json
from pathlib import Path

import distill_kernels

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import load_file

from logitstore.build import BuildConfig, build
from logitstore.errors import ModelError, UnusableLogitsError
from logitstore.recipe import Recipe
from logitstore.selection import Selection
from logitstore.targets import SparseTargets
from logitstore.teacher import Teacher
from tests.tiny import CORPUS, save_tiny_gpt2, save_tiny_model

Array = npt.NDArray[np.float64]
LENGTHS = (9, 2, 23)


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


def rope(x: Array, theta: float) -> Array:
    """Rotate the pairs (i, i + d/2) of [heads, L, d] by position * theta^(-2i/d)."""
    half = x.shape[-1] // 2
    angle = np.arange(x.shape[1])[:, None] * theta ** (-np.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), a * np.sin(angle) + b * np.cos(angle)], -1)


def llama_logits(path: Path, token_ids: npt.NDArray[np.int32]) -> Array:
    """Logits [L, V] of a saved llama: RMSNorm, rotary positions, grouped-query attention, SwiGLU, tied head."""
    c = json.loads((path / "config.json").read_text())
    w = {name: value.astype(np.float64) for name, value in load_file(path / "model.safetensors").items()}
    heads, kv_heads, eps = c["num_attention_heads"], c["num_key_value_heads"], c["rms_norm_eps"]
    x = w["model.embed_tokens.weight"][token_ids]
    length = len(x)
    for i in range(c["num_hidden_layers"]):
        p = {name.split(f"layers.{i}.")[1]: value for name, value in w.items() if f".layers.{i}." in name}
        h = rms_norm(x, p["input_layernorm.weight"], eps)
        q, k, v = (
            (h @ p[f"self_attn.{name}_proj.weight"].T).reshape(length, n, -1).transpose(1, 0, 2)
            for name, n in (("q", heads), ("k", kv_heads), ("v", kv_heads))
        )
        q, k = rope(q, c["rope_theta"]), rope(k, c["rope_theta"])
        k, v = (np.repeat(array, heads // kv_heads, axis=0) for array in (k, v))
        scores = q @ k.transpose(0, 2, 1) / np.sqrt(q.shape[-1])
        scores[:, np.triu(np.ones((length, length), bool), 1)] = -np.inf
        attention = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = (attention / attention.sum(-1, keepdims=True) @ v).transpose(1, 0, 2).reshape(length, -1)
        x = x + mixed @ p["self_attn.o_proj.weight"].T
        h = rms_norm(x, p["post_attention_layernorm.weight"], eps)
        gate = h @ p["mlp.gate_proj.weight"].T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ p["mlp.up_proj.weight"].T)) @ p["mlp.down_proj.weight"].T
    return np.asarray(rms_norm(x, w["model.norm.weight"], eps) @ w["model.embed_tokens.weight"].T)


def log_softmax(z: Array) -> Array:
    z = z - z.max(-1, keepdims=True)
    return np.asarray(z - np.log(np.exp(z).sum(-1, keepdims=True)))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("teacher") / "tiny")


def answers(teacher: Teacher, select: str) -> list[tuple[npt.NDArray[np.int32], SparseTargets]]:
    """Targets of documents of different lengths, asked as one batch."""
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, teacher.vocab_size, length).astype(np.int32) for length in LENGTHS]
    recipe = Recipe(Selection.parse(select), (1.0,), 0, teacher.vocab_size)
    return [(r.token_ids, recipe.read(r.records)) for r in teacher.records(documents, recipe)]


def test_position_t_keeps_what_the_teacher_says_of_token_t_plus_1(model: Path) -> None:
    teacher = Teacher(str(model), quiet=True)
    for token_ids, targets in answers(teacher, f"top-k:{teacher.vocab_size}"):
        expected = log_softmax(llama_logits(model, token_ids))[:-1]
        assert len(targets) == len(token_ids) - 1 == len(expected)
        rows = np.arange(len(targets))
        assert np.abs(targets.label_log_prob - expected[rows, token_ids[1:]]).max() <= 1 / 32 + 1e-3
        assert np.abs(targets.entropy + (np.exp(expected) * expected).sum(-1)).max() <= 1 / 32 + 1e-3

        weights = np.zeros_like(expected)
        weights[rows[:, None], targets.ids] = targets.weights
        largest = np.exp(expected) == np.exp(expected).max(-1, keepdims=True)  # takes what the others leave
        step = np.exp(expected) * (np.exp(1 / 16) - 1 + 1e-3) + np.exp(-254 / 16)
        assert ((np.abs(weights - np.exp(expected)) <= step) | largest).all()
        assert np.abs(weights[largest] - np.exp(expected[largest])).max() < 0.03
        shifted = np.abs(weights[1:] - np.exp(expected[:-1])).max() if len(rows) > 1 else 1.0
        assert shifted > 0.05, "the neighbouring position's targets must not pass for these"


def test_the_threshold_heads_are_the_same_probabilities(model: Path) -> None:
    for token_ids, targets in answers(Teacher(str(model), quiet=True), "threshold:32"):
        expected = np.exp(log_softmax(llama_logits(model, token_ids))[:-1])
        kept = np.take_along_axis(expected, targets.ids.astype(np.int64), axis=1)
        head = np.arange(32) < targets.head_count[:, None]
        assert head.any() and (np.abs(targets.weights - kept)[head] <= kept[head] * 0.07 + 0.02).all()
        assert np.abs(targets.weights.sum(1) - 1).max() < 1e-3 and (np.diff(np.sort(targets.ids, 1)) > 0).all()


def test_a_document_alone_and_in_a_batch_has_the_same_record_but_for_rounding(model: Path) -> None:
    teacher = Teacher(str(model), quiet=True)
    for token_ids, targets in answers(teacher, "threshold:16"):
        recipe = Recipe(Selection("threshold", 16), (1.0,), 0, teacher.vocab_size)
        (alone,) = teacher.records([token_ids], recipe)
        assert (recipe.read(alone.records).ids == targets.ids).mean() > 0.99


def test_logits_in_parts_and_at_once_give_the_same_records(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = Teacher(str(model), quiet=True)
    at_once = answers(teacher, "top-k:8")
    monkeypatch.setattr("logitstore.forward.logit_rows", lambda _: 5)
    for (_, a), (_, b) in zip(at_once, answers(teacher, "top-k:8"), strict=True):
        assert (a.ids == b.ids).mean() > 0.99 and np.abs(a.label_log_prob - b.label_log_prob).max() <= 1 / 16


def test_selection_on_the_device_and_on_the_cpu_agree(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = Teacher(str(model), quiet=True)
    for select in ("threshold:16", "top-k:16"):
        on_cpu = answers(teacher, select)
        with monkeypatch.context() as patch:
            patch.setattr(distill_kernels, "on_cpu", lambda: False)
            on_device = answers(teacher, select)
        for (_, a), (_, b) in zip(on_cpu, on_device, strict=True):
            assert (a.ids == b.ids).mean() > 0.99 and np.abs(a.weights - b.weights).max() < 0.02


def test_a_document_with_more_places_than_a_gpt2_has_learned_is_refused(tmp_path: Path) -> None:
    save_tiny_gpt2(tmp_path, places=16)
    teacher, recipe = Teacher(str(tmp_path), quiet=True), Recipe(Selection("top-k", 8), (1.0,), 0, 384)
    (answer,) = teacher.records([np.arange(17, dtype=np.int32)], recipe)
    assert len(answer.records) == 16
    with pytest.raises(UnusableLogitsError, match=r"17 tokens to read, but .* 16 places; type --max-seq-length 16"):
        teacher.records([np.arange(18, dtype=np.int32)], recipe)
    (tmp_path / "d.jsonl").write_text(json.dumps({"text": CORPUS[0]}))
    with pytest.raises(UnusableLogitsError, match="places"):  # before anything is written
        build(BuildConfig(str(tmp_path), str(tmp_path / "d.jsonl"), tmp_path / "s", quiet=True))
    assert not (tmp_path / "s").exists()


def test_a_teacher_that_gives_nan_is_refused(tmp_path: Path) -> None:
    path = save_tiny_model(tmp_path / "tiny", layers=1)
    weights = mx.load(str(path / "model.safetensors"))
    weights["model.norm.weight"] = weights["model.norm.weight"] * float("nan")
    mx.save_safetensors(str(path / "model.safetensors"), weights)
    with pytest.raises(ModelError, match=r"teacher tiny cannot be used: .*NaN"):
        answers(Teacher(str(path), quiet=True), "threshold:16")
