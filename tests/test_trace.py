import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import distill_kernels

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from distill_trainer.attention_maps import attention_maps
from distill_trainer.gradients import checkpoint_layers
from logitstore.errors import ConfigError, ModelError
from logitstore.model import load_model
from logitstore.trace import traced
from tests.tiny import save_tiny_model

TOKENS = mx.array([[5, 9, 260, 3], [7, 7, 1, 0]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("m") / "model")


def by_hand(model: Any, count: int) -> mx.array:
    """The residual stream after `count` layers."""
    hidden = model.model.embed_tokens(TOKENS)
    for layer in model.layers[:count]:
        hidden = layer(hidden, "causal")
    return hidden


def test_what_is_kept_is_the_residual_stream_after_each_layer(folder: Path) -> None:
    model = load_model(folder).model
    expected, logits = {n: np.array(by_hand(model, n + 1)) for n in (0, 2, 3)}, np.array(model(TOKENS))
    with traced(model, (3, 0, 2)) as found:
        assert np.array_equal(model(TOKENS), logits)
    assert found.keys() == {0, 2, 3}
    for number, hidden in found.items():
        assert np.allclose(hidden, expected[number], atol=1e-6)
    last = model.model.norm(found[3])
    assert np.allclose(model.model.embed_tokens.as_linear(last), logits, atol=1e-5)


def test_the_layers_are_what_they_were_after_the_block_also_where_it_fails(folder: Path) -> None:
    model, other = load_model(folder).model, load_model(folder).model
    kind = type(model.layers[0])
    with pytest.raises(RuntimeError, match="on purpose"), traced(model, (1,)) as found:
        assert type(model.layers[1]) is not kind
        assert type(model.layers[0]) is kind and type(other.layers[1]) is kind
        other(TOKENS)
        assert not found
        raise RuntimeError("on purpose")
    assert all(type(layer) is kind for layer in model.layers)
    model(TOKENS)
    assert not found


@pytest.mark.parametrize("twice", [False, True])
def test_gradients_flow_through_what_is_kept_with_layers_computed_twice_too(folder: Path, twice: bool) -> None:
    model = load_model(folder).model
    model.train()
    expected = nn.value_and_grad(model, lambda: mx.square(by_hand(model, 2)).mean() + model(TOKENS).mean())()
    if twice:
        checkpoint_layers(model)
    kind = type(model.layers[1])

    def loss() -> mx.array:
        with traced(model, (1,)) as found:
            hidden = distill_kernels.split_head(model).trunk(TOKENS)
            return mx.square(found[1]).mean() + model.model.embed_tokens.as_linear(hidden).mean()

    value, gradient = nn.value_and_grad(model, loss)()
    assert value.item() == pytest.approx(expected[0].item(), rel=1e-5)
    for number in range(4):
        name = ("model", "layers", number, "mlp", "up_proj", "weight")
        one, two = expected[1], gradient
        for key in name:
            one, two = one[key], two[key]
        assert np.allclose(one, two, atol=1e-6, rtol=1e-4) and np.abs(one).max() > 0
    assert type(model.layers[1]) is kind


@pytest.mark.parametrize("reader", [traced, attention_maps])
def test_what_a_pass_kept_is_freed_with_it_and_not_when_python_looks_for_cycles(
    folder: Path, reader: Callable[..., Any]
) -> None:
    model = load_model(folder).model

    def read() -> int:
        with reader(model, (0, 1, 2, 3)) as found:
            mx.eval(model(TOKENS), found)
            assert len(found) == 4
        del found
        return mx.get_active_memory()

    gc.disable()
    try:
        before = read()
        assert [read() for _ in range(5)] == [before] * 5
    finally:
        gc.enable()


def test_a_layer_that_gives_a_tuple_is_read_by_its_first() -> None:
    class Pair(nn.Module):
        def __call__(self, x: mx.array) -> tuple[mx.array, mx.array]:
            return x + 1, x

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = [Pair()]

        def __call__(self, x: mx.array) -> mx.array:
            return self.layers[0](x)[1]

    model = Model()
    with traced(model, (0,)) as found:
        assert model(mx.array([1.0])).item() == 1
    assert found[0].item() == 2


def test_layers_that_are_not_there_are_refused(folder: Path) -> None:
    model = load_model(folder).model
    for number in (4, -1):
        with pytest.raises(ConfigError, match=f"layer {number} is asked for, and the model has layers 0 to 3"):
            traced(model, (0, number)).__enter__()
    assert len({type(layer) for layer in model.layers}) == 1
    with pytest.raises(ModelError, match=r"Linear has no plain list of layers, so its hidden states cannot be read"):
        traced(nn.Linear(2, 2), (0,)).__enter__()
