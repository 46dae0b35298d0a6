"""What the layers of a model give, read as it runs: the residual stream after some of them.

The build, the live teacher and the student are all read through this. A forward pass stays what it was, gradients too.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import distill_kernels  # noqa: F401  loads a fast BLAS before MLX

import mlx.core as mx
from mlx.nn.layers.base import Module

from logitstore.errors import ConfigError, ModelError


@contextmanager
def traced(model: Module, layers: Sequence[int]) -> Iterator[dict[int, mx.array]]:
    """While the block runs, put the output [B, T, D] of each of these layers into the dict, anew in every forward pass.

    The layers become instances of a subclass of their own class and are restored at the end, so another model of that
    class is as it was. Inside `nn.value_and_grad` the arrays belong to the pass that made them: use them in it, and
    gradients flow through them.

    Args:
        layers: numbers from 0; layer n's output is the residual stream after it.

    Raises:
        ConfigError: a number that the model has no layer of.
        ModelError: the model has no plain list of layers.
    """
    every = layers_of(model)
    for number in layers:
        if not 0 <= number < len(every):
            raise ConfigError(
                f"layer {number} is asked for, and the model has layers 0 to {len(every) - 1}; "
                f"type numbers from 0 to {len(every) - 1}"
            )
    found: dict[int, mx.array] = {}
    with as_instances([(every[number], _keeping(type(every[number]), number, found)) for number in set(layers)]):
        yield found


@contextmanager
def as_instances(parts: Sequence[tuple[Module, type[Any]]]) -> Iterator[None]:
    """While the block runs, let each of these parts of a model be an instance of a subclass of its own class.

    A class refers to itself, so Python frees it late; what its `__call__` holds, as the arrays of a pass, is free after
    the block.
    """
    kinds = [(part, type(part)) for part, _ in parts]
    try:
        for part, kind in parts:
            part.__class__ = kind
        yield
    finally:
        for part, kind in kinds:
            part.__class__ = kind
        for _, made in parts:
            del made.__call__


def layers_of(model: Module) -> list[Any]:
    """A model's layers.

    Raises:
        ModelError: it has no plain list of them.
    """
    layers = getattr(model, "layers", None)
    if not isinstance(layers, list) or not layers:
        kind = type(model)
        raise ModelError(
            f"{kind.__module__}.{kind.__name__} has no plain list of layers, so its hidden states cannot be read; "
            "leave them out, or type a model of another family"
        )
    return layers


def _keeping(kind: type[Any], number: int, found: dict[int, mx.array]) -> type[Any]:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = kind.__call__(self, *args, **kwargs)
        found[number] = output[0] if isinstance(output, tuple) else output
        return output

    return type(kind.__name__, (kind,), {"__call__": call})
