"""A model's attention maps, read as it runs.

MLX's fused attention makes no maps, so each is computed a second time beside it, from the queries and keys that the
model's own code gives to it: after its projections, norms and rotary embedding.

    map = mean over heads of softmax(scale · q k^T + mask)        [B, T, T], rows sum to 1

A model can be read where its layers have one part that calls mlx-lm's `scaled_dot_product_attention`, which most do.
Scores [B, heads, T, T] exist for a layer at a time, and for the gradient of all of them at once.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import distill_kernels  # noqa: F401  loads a fast BLAS before MLX

import mlx.core as mx
from mlx.nn.layers.base import Module

from logitstore.errors import ModelError
from logitstore.trace import as_instances, layers_of

_CALL = "scaled_dot_product_attention"


@contextmanager
def attention_maps(model: Module, layers: Sequence[int]) -> Iterator[dict[int, mx.array]]:
    """While the block runs, put the map [B, T, T] of each of these layers into the dict, anew in every forward pass.

    As `logitstore.trace.traced`, for attention. Not for layers that `--grad-checkpoint` computes twice: what is read
    inside of them has no gradient.

    Raises:
        ModelError: a layer whose attention cannot be read.
    """
    every = layers_of(model)
    parts = {number: _attention_of(every[number], number) for number in layers}
    found: dict[int, mx.array] = {}
    with as_instances([(part, _reading(type(part), number, found)) for number, part in parts.items()]):
        yield found


def require_maps(model: Module, layers: Sequence[int]) -> None:
    """Check on four tokens that these layers' maps can be read; the model should be in eval mode.

    Raises:
        ModelError: they cannot.
    """
    with attention_maps(model, layers) as found:
        mx.eval(model(mx.array([[0, 1, 2, 1]])))
    for number in layers:
        there = found.get(number)
        if there is None or there.shape != (1, 4, 4) or not mx.allclose(there.sum(axis=-1), mx.array(1.0)).item():
            raise _unreadable(layers_of(model)[number], number, "it gave no map of four tokens by four")


def mean_map(queries: mx.array, keys: mx.array, scale: float, mask: Any) -> mx.array:
    """Mean over heads of softmax(scale · q k^T + mask), float32 [B, T, T].

    Args:
        queries: [B, heads, T, D].
        keys: [B, heads / n, T, D]; each serves n neighbouring heads.
        mask: None, "causal", true where a query sees a key, or what is added to the scores.
    """
    batch, heads, length, width = queries.shape
    grouped = queries.astype(mx.float32).reshape(batch, keys.shape[1], -1, length, width)
    scores = (grouped * scale) @ keys.astype(mx.float32)[:, :, None].swapaxes(-1, -2)
    scores = scores.reshape(batch, heads, length, -1)
    if isinstance(mask, str):
        mask = mx.arange(length)[:, None] >= mx.arange(scores.shape[-1])
    if mask is not None:
        scores = mx.where(mask, scores, -mx.inf) if mask.dtype == mx.bool_ else scores + mask
    return mx.softmax(scores, axis=-1).mean(axis=1)


def _attention_of(layer: Module, number: int) -> Module:
    parts: list[Module] = [part for part in layer.children().values() if isinstance(part, Module)]  # type: ignore[no-untyped-call]
    readable = [part for part in parts if _calls_attention(type(part))]
    if len(readable) != 1:
        raise _unreadable(layer, number, f"{len(readable)} of its parts call {_CALL}, expected one")
    return readable[0]


def _calls_attention(kind: type[Any]) -> bool:
    call = kind.__call__
    return isinstance(call, FunctionType) and _CALL in call.__code__.co_names and callable(call.__globals__.get(_CALL))


def _reading(kind: type[Any], number: int, found: dict[int, mx.array]) -> type[Any]:
    call = kind.__call__
    attend = call.__globals__[_CALL]

    def reading(
        queries: mx.array, keys: mx.array, values: mx.array, cache: Any, scale: float, mask: Any, sinks: Any = None
    ) -> Any:
        if sinks is not None:
            raise ModelError(
                f"{kind.__module__}.{kind.__name__} has attention sinks, so the rows of its maps do not sum to 1; "
                "leave --attention-loss out"
            )
        found[number] = mean_map(queries, keys, scale, mask)
        return attend(queries, keys, values, cache=cache, scale=scale, mask=mask)

    own = FunctionType(
        call.__code__, {**call.__globals__, _CALL: reading}, call.__name__, call.__defaults__, call.__closure__
    )
    own.__kwdefaults__ = call.__kwdefaults__
    return type(kind.__name__, (kind,), {"__call__": own})


def _unreadable(layer: Module, number: int, why: str) -> ModelError:
    kind = type(layer)
    return ModelError(
        f"the attention of {kind.__module__}.{kind.__name__} (layer {number}) cannot be read: {why}; "
        "leave --attention-loss out, or name other layers with --layer-map"
    )
