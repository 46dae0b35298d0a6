"""A loss per row of logits, as the two halves that a fused head needs apart: `forward`, and a hand-written `backward`.

Calling a loss differentiates through its own `backward`, never through MLX's autodiff of `forward`. Between the halves
live only `saved` floats, one or two per row: given those, a later pass over the same logits (see `head.chunked`, which
computes every logit twice) skips the reductions, and with them the exponentials that are most of a loss's time.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

Arrays = tuple[mx.array, ...]


class RowLoss:
    """Row-wise losses of logits [N, V] and constants `rows` (arrays of N rows: targets, labels, masks).

    A gradient flows to the logits alone; the rows are the teacher's and get zeros.
    """

    def forward(self, logits: mx.array, *rows: mx.array) -> tuple[Arrays, Arrays]:
        """Return (losses, saved): float32 arrays of N rows each."""
        raise NotImplementedError

    def backward(self, logits: mx.array, *rows: mx.array, saved: Arrays, cotangents: Arrays) -> mx.array:
        """Return sum_j cotangents[j] · d losses[j] / d logits, shape and dtype of the logits."""
        raise NotImplementedError

    def __call__(self, logits: mx.array, *rows: mx.array, saved: Arrays | None = None) -> Arrays:
        """Return the losses, each [N]. With `saved` of an earlier pass, a gradient evaluates nothing of `forward`."""

        def forward(logits: mx.array, *rows: mx.array) -> tuple[Arrays, Arrays]:
            return self.forward(logits, *rows)

        def backward(primals: Arrays, cotangents: tuple[Arrays, Arrays], outputs: tuple[Arrays, Arrays]) -> Arrays:
            known = outputs[1] if saved is None else saved
            return (self.backward(*primals, saved=known, cotangents=cotangents[0]),)  # nothing for the rows: zeros

        losses: Arrays = with_vjp(forward, backward)(logits, *rows)[0]
        return losses


@dataclass(frozen=True)
class TemperedLoss(RowLoss):
    """A row loss at one temperature, which is above 0."""

    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature must be above 0, found {self.temperature}")


@dataclass(frozen=True)
class Autodiff(RowLoss):
    """Any function of (logits [N, V], *rows) that returns one [N] array or a tuple of them, with MLX's own gradient."""

    function: Callable[..., mx.array | Arrays]

    def forward(self, logits: mx.array, *rows: mx.array) -> tuple[Arrays, Arrays]:
        losses = self.function(logits, *rows)
        return ((losses,) if isinstance(losses, mx.array) else tuple(losses)), ()

    def backward(self, logits: mx.array, *rows: mx.array, saved: Arrays, cotangents: Arrays) -> mx.array:
        del saved
        return mx.vjp(lambda z: list(self.forward(z, *rows)[0]), [logits], list(cotangents))[1][0]


def with_vjp(function: Callable[..., Any], vjp: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function` with the gradient `vjp(primals, cotangents, outputs)`.

    What `function` captures gets a gradient of zero without a word: everything differentiable has to be an argument.
    """
    custom = mx.custom_function(function)
    custom.vjp(vjp)
    return custom


def check_rows(logits: mx.array, targets: tuple[mx.array, mx.array], vectors: dict[str, mx.array]) -> None:
    """Raise ValueError unless logits are [N, V], the two target arrays [N, k] alike and every named vector [N]."""
    if logits.ndim != 2:
        raise ValueError(f"logits must be [N, V], found shape {logits.shape}")
    ids, weights = targets
    if ids.ndim != 2 or ids.shape != weights.shape or len(ids) != len(logits):
        raise ValueError(f"ids and weights must be [{len(logits)}, k] alike, found {ids.shape} and {weights.shape}")
    for name, vector in vectors.items():
        if vector.shape != logits.shape[:1]:
            raise ValueError(f"{name} must be [{len(logits)}], found shape {vector.shape}")


def in_vocabulary(ids: mx.array, vocab: int) -> tuple[mx.array, mx.array]:
    """Return (which ids lie in [0, vocab), the ids with all others set to 0, which is safe to read)."""
    inside = (ids >= 0) & (ids < vocab)
    return inside, mx.where(inside, ids, 0)


def at_ids(logits: mx.array, ids: mx.array) -> mx.array:
    """Return logits[n, ids[n, i]] in float32, [N, k]."""
    return mx.take_along_axis(logits, ids, axis=-1).astype(mx.float32)


def add_at_ids(dense: mx.array, ids: mx.array, values: mx.array) -> mx.array:
    """Return dense [N, V] with values [N, k] added at ids [N, k]; an id may repeat."""
    return dense.at[mx.arange(len(ids))[:, None], ids].add(values)


def log_sum_exp(logits: mx.array) -> mx.array:
    """Return log sum_j exp(logits_j) over the last axis, [N, V] float32 -> [N] float32; -inf entries count as nothing.

    In two levels, blocks and then the blocks' results: MLX's CPU backend adds one by one, and over 49,152 normal logits
    of scale 4 is off by up to 1.5e-4 in one level, 2.6e-6 in two (float64 beside it), for 3% more time. A vocabulary
    that is no multiple of the block is padded with -inf.
    """
    block = 256
    rows, vocab = logits.shape
    if vocab > block:
        if vocab % block:
            logits = mx.pad(logits, [(0, 0), (0, -vocab % block)], constant_values=mx.array(-mx.inf))
        logits = mx.logsumexp(logits.reshape(rows, -1, block), axis=-1)
    return mx.logsumexp(logits, axis=-1)


def counted(ids: mx.array, weights: mx.array, vocab: int) -> tuple[mx.array, mx.array]:
    """Return ids that are safe to read and float32 weights that are 0 where the entry does not count, both [N, k]."""
    inside, ids = in_vocabulary(ids, vocab)
    weights = weights.astype(mx.float32)
    return ids, mx.where(inside & (weights > 0), weights, 0)


def cross_entropy(logits: mx.array, labels: mx.array, lse: mx.array) -> mx.array:
    """Return lse - logits[label], [N] float32; 0 where the label is outside the vocabulary."""
    labelled, labels = in_vocabulary(labels, logits.shape[1])
    return mx.where(labelled, lse - at_ids(logits, labels[:, None])[:, 0], 0)
