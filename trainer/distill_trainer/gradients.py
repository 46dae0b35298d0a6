"""Gradients of a step: of several batches as of one, clipped, and of layers that are computed twice to save memory.

A student in float16, which on a GPU is trained as it is with LoRA, has its gradient taken of a multiple of the loss.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import distill_kernels  # noqa: F401  loads a fast BLAS before MLX

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.nn.layers.base import Module
from mlx.utils import tree_flatten, tree_map

from distill_trainer.batches import Batch
from logitstore.errors import ModelError

Means = tuple[mx.array, ...]
"""Total loss and cross-entropy, weighted means over trained positions, around the KL, one over those with targets; then
each method's, over the positions where its teacher said something."""


def value_and_gradient(model: Module, loss: Callable[..., Means]) -> Callable[..., tuple[Means, Any]]:
    """`nn.value_and_grad` of a loss (losses, batch) -> `Means`; of a model in float16 by way of the sum over the rows.

    A row's part of a mean over N rows is 1 / N, and float16 knows nothing below 6e-8: of 4,096 rows at V = 50,000 the
    gradient of LoRA's parameters, float32 themselves, was 10.7 degrees off and 8 % too short, by way of the sum 0.5
    degrees and none. Where float16 cannot hold a sum, which is below 65,504, less of it is taken.

    Reference: Micikevicius et al., "Mixed Precision Training", 2018, section 3.2 (loss scaling).
    """
    step: Callable[..., tuple[Means, Any]] = nn.value_and_grad(model, loss)
    if all(values.dtype != mx.float16 for values in _arrays(model.parameters())):  # type: ignore[no-untyped-call]
        return step

    def by_the_sum(losses: Any, batch: Batch) -> tuple[Means, Any]:
        n = float(len(batch.rows))
        for by in (n, n**0.5, 1.0):
            (total, *means), larger = step(losses, batch.times(by))
            gradients = tree_map(lambda g, by=by: g / by, larger)
            if mx.stack([mx.isfinite(gradient).all() for gradient in _arrays(gradients)]).all().item():
                break
        return (total / by, *means), gradients

    return by_the_sum


def mean_gradient(step: Callable[[Batch], tuple[Means, Any]], batches: Sequence[Batch]) -> tuple[Means, Any]:
    """Losses and gradient of some batches as of one that holds all of their documents.

    sum_i (n_i / n) g_i, with n_i trained positions in batch i, or the sum of their weights. One batch's graph exists at
    a time.
    """
    if len(batches) == 1:
        return step(batches[0])
    weights = weights_of(batches)
    totals = [sum(column) or 1 for column in zip(*weights, strict=True)]
    sums, gradients = [mx.array(0.0)] * len(totals), None
    for batch, own in zip(batches, weights, strict=True):
        means, gradient = step(batch)
        shares = [weight / total for weight, total in zip(own, totals, strict=True)]
        share = shares[0]
        sums = [total + part * mean for total, part, mean in zip(sums, shares, means, strict=True)]
        scaled = tree_map(lambda g, share=share: share * g, gradient)
        gradients = scaled if gradients is None else tree_map(mx.add, gradients, scaled)
        mx.eval(gradients, sums)
    return tuple(sums), gradients


def weights_of(batches: Sequence[Batch]) -> list[list[float]]:
    """What each batch weighs in each of the `Means` over several."""
    return [
        [
            _number(weight)
            for weight in (b.weight, b.answered_weight, b.weight, *(each.weights.sum() for each in b.beside))
        ]
        for b in batches
    ]


def _number(value: mx.array | int) -> float:
    return value if isinstance(value, int) else cast(float, value.item())


def _arrays(tree: Any) -> list[mx.array]:
    return list(cast(dict[str, mx.array], tree_flatten(tree, destination={})).values())


def clipped(gradients: Any, max_norm: float | None) -> tuple[Any, mx.array | None]:
    """Gradients scaled down to a global norm where theirs is larger, and the norm that they had; or as they are."""
    if max_norm is None:
        return gradients, None
    found: tuple[Any, mx.array] = optim.clip_grad_norm(gradients, max_norm)  # type: ignore[no-untyped-call]
    return found


def checkpoint_layers(model: Module) -> None:
    """Let each of a model's layers keep its input alone and be computed again for its gradient.

    The layers become instances of a subclass of their own class, so another model of that class is as it was; a
    second call changes nothing. What dropout drew the first time it draws again.

    Raises:
        ModelError: the model has no list of layers.

    Reference: Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016.
    """
    layers = getattr(model, "layers", None)
    if not isinstance(layers, list) or not layers:
        raise ModelError("this student has no plain list of layers; leave --grad-checkpoint out")
    for layer in layers:
        if not getattr(layer, "computed_twice", False):
            layer.__class__ = _computed_twice(type(layer))


def _computed_twice(kind: type[Module]) -> type[Module]:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not self.training:
            return kind.__call__(self, *args, **kwargs)
        key, again = random_key(), False

        def forward(parameters: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal again
            own, later = self.trainable_parameters(), random_key()
            if again:
                seed(key)
            try:
                self.update(parameters)
                return kind.__call__(self, *args, **kwargs)
            finally:
                self.update(own)
                if again:
                    seed(later)
                again = True

        return mx.checkpoint(forward)(self.trainable_parameters(), *args, **kwargs)

    return type(kind.__name__, (kind,), {"__call__": call, "computed_twice": True})


def random_key() -> mx.array:
    """What MLX's random state is at, uint32 [2]."""
    return cast(list[mx.array], mx.random.state)[0]


def seed(key: mx.array) -> None:
    """Set MLX's random state to a key, uint32 [2]: a seed's upper and lower half."""
    high, low = cast(list[int], key.tolist())
    mx.random.seed(high << 32 | low)
