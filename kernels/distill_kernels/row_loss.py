"""A loss per row of logits, as the two halves that a fused head needs apart: `forward`, and a hand-written `backward`.

Calling a loss differentiates through its own `backward`, never through MLX's autodiff of `forward`. Between the halves
live only `saved` floats, a few per row: given those, a later pass over the same logits (`fused_head.chunked` computes
every logit twice) skips the reductions, and with them the exponentials that are most of a loss's time.
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
            dz = self.backward(*primals, saved=known, cotangents=cotangents[0])
            # Left out, a row's gradient would be whatever array comes to lie in its place (MLX 0.32.4), not zeros.
            return first_order(dz, *primals), *(mx.zeros_like(r) for r in primals[1:])

        losses: Arrays = with_vjp(forward, backward)(logits, *rows)[0]
        return losses


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


def first_order(gradient: Any, *inputs: Any) -> Any:
    """Return a gradient that refuses to be differentiated: it takes `saved` as constants, which they are not.

    Raises, when it is differentiated:
        ValueError: always.
    """

    def refused(*_: Any) -> Any:
        raise ValueError("a hand-written gradient has no gradient of its own: take one derivative, in reverse mode")

    return with_vjp(lambda found, *_: found, refused)(gradient, *inputs)


def with_vjp(function: Callable[..., Any], vjp: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function` with the gradient `vjp(primals, cotangents, outputs)`.

    What `function` captures gets a gradient of zero without a word: everything differentiable has to be an argument.
    """
    custom = mx.custom_function(function)
    custom.vjp(vjp)
    return custom
