import json
from pathlib import Path
from typing import Any

import distill_kernels
from distill_kernels import SparseKL

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import gemma3_text, gpt2, llama, mamba, qwen3

from distill_trainer.batch_loss import batch_loss
from distill_trainer.batches import Batch, Weighing, collate
from distill_trainer.gradients import checkpoint_layers
from distill_trainer.packing import Apart, padding, require_apart, rows_of
from distill_trainer.train import train
from logitstore.errors import ConfigError, ModelError
from logitstore.model import load_model
from logitstore.store import open_store
from tests.runs import World, make_world

SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "intermediate_size": 64, "num_attention_heads": 4, "head_dim": 8}
SIZES |= {"num_key_value_heads": 2, "vocab_size": 300, "rms_norm_eps": 1e-5, "rope_theta": 1e4}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize(
    ("lengths", "longest", "width", "count"),
    [
        ([200, 100, 100], 512, 200, 2),  # one row of 400 holds no less, and its attention costs more
        ([200, 100, 100], 150, 200, 3),
        ([5, 5, 4, 1], 10, 5, 3),
        ([7, 7, 7], 100, 7, 3),
        ([9, 1, 1], 100, 11, 1),
        ([9, 1, 1], None, 9, 3),
        ([3], 10, 3, 1),
    ],
)
def test_documents_go_where_least_is_padding(lengths: list[int], longest: int | None, width: int, count: int) -> None:
    places = rows_of(lengths, longest)
    taken = {(row, at + i) for (row, at), length in zip(places, lengths, strict=True) for i in range(length)}
    assert len(taken) == sum(lengths)  # none lies on another
    assert (1 + max(row for row, _ in taken), 1 + max(at for _, at in taken)) == (count, width)
    assert padding([lengths, lengths], longest) == pytest.approx(1 - sum(lengths) / (width * count))


def test_padding_is_counted_where_a_process_has_no_document_of_a_batch() -> None:
    assert padding([[3, 4], [], [2]], None) == 1 - 9 / 10
    assert padding([[]], 8) == 0


def test_a_document_sees_itself_as_far_as_it_is_and_within_the_window() -> None:
    apart = Apart(mx.array([[0, 0, 1, 1, 1, -1]]))
    for window in (None, 2):
        mask = np.array(apart.make_mask(6, return_array=True, window_size=window))[0, 0, :5]
        for query, seen in enumerate(mask):
            first = 0 if query < 2 else 2
            assert np.flatnonzero(seen).tolist() == list(range(max(first, query + 1 - (window or 6)), query + 1))


def gradient(model: Any, batch: Batch) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    head = distill_kernels.split_head(model)
    means, found = nn.value_and_grad(model, lambda b: batch_loss(head, SparseKL(), b))(batch)
    return np.array([mean.item() for mean in means]), {name: np.array(g) for name, g in tree_flatten(found)}


@pytest.mark.parametrize("twice", [False, True])
def test_the_gradient_of_a_packed_batch_is_that_of_the_same_documents_unpacked(world: World, twice: bool) -> None:
    store, documents = open_store(world.store), world.sequences()
    targets = [None if i == 1 else store.get(s.token_ids) for i, s in enumerate(documents)]
    model = load_model(world.student).model
    model.unfreeze()
    model.train()
    if twice:
        checkpoint_layers(model)
    plain, packed = (collate(documents, targets, Weighing(0.9, "hard-only"), longest) for longest in (None, 512))
    assert plain is not None and packed is not None
    assert packed.tokens.size < plain.tokens.size and plain.documents is None and packed.documents is not None
    (means, whole), (found, others) = gradient(model, plain), gradient(model, packed)
    assert np.allclose(found, means, rtol=1e-5)
    for name, value in whole.items():
        assert np.allclose(others[name], value, rtol=1e-4, atol=1e-6 + 1e-4 * np.abs(value).max()), name


def test_models_that_keep_documents_apart_are_taken_and_others_refused() -> None:
    mx.random.seed(0)
    usual: Any = llama.Model(llama.ModelArgs.from_dict(SIZES | {"model_type": "llama"}))
    normed = qwen3.ModelArgs.from_dict(
        SIZES | {"model_type": "qwen3", "max_position_embeddings": 64, "tie_word_embeddings": True}
    )
    windows = {"model_type": "gemma3_text", "sliding_window": 3, "sliding_window_pattern": 2}
    slides = gemma3_text.ModelArgs.from_dict(SIZES | windows)
    for model in (usual, qwen3.Model(normed), gemma3_text.Model(slides)):
        model.train()
        require_apart(model, "s")
        assert model.training
    usual.set_dtype(mx.bfloat16)
    require_apart(usual, "s")
    sizes = {"n_ctx": 64, "n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64, "layer_norm_epsilon": 1e-5}
    absolute = gpt2.Model(gpt2.ModelArgs.from_dict(sizes | {"model_type": "gpt2", "vocab_size": 300}))
    with pytest.raises(ModelError, match=r"student s is a gpt2, .* others than those .* alone; leave --pack out"):
        require_apart(absolute, "s")
    sizes = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "state_size": 4, "num_hidden_layers": 2}
    sizes |= {"conv_kernel": 4, "use_bias": False, "use_conv_bias": True, "time_step_rank": 4}
    recurrent = mamba.Model(mamba.ModelArgs.from_dict(sizes | {"model_type": "mamba"}))
    with pytest.raises(ModelError, match=r"student s is a mamba, .*; leave --pack out"):
        require_apart(recurrent, "s")

    class Leaks(llama.Model):
        def __call__(self, inputs: mx.array, _cache: Any = None) -> mx.array:
            return super().__call__(inputs)

    leaks: Any = Leaks(llama.ModelArgs.from_dict(SIZES | {"model_type": "llama"}))
    with pytest.raises(ModelError, match="change with the tokens of another"):
        require_apart(leaks, "s")


def test_a_packed_run_learns_what_the_other_does_and_says_what_it_saves(tmp_path: Path, world: World) -> None:
    options = {"store": (str(world.store),), "iters": 4, "batch_size": 4, "fine_tune_type": "full"}
    _, plain = world.train(tmp_path / "plain", **options)
    said: list[str] = []
    out = tmp_path / "packed"
    train(world.config(out, pack=True, **options), said.append)
    packed = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert any(line.startswith("padding: ") and line.endswith("without --pack") for line in said)
    for name in ("loss", "kd_loss", "ce_loss", "trained_tokens", "hits"):
        assert [step[name] for step in packed] == pytest.approx([step[name] for step in plain], rel=1e-4), name
    with pytest.raises(ConfigError, match="leave --pack out"):
        world.config(tmp_path, pack=True, teacher="t", hidden_loss="mse")
