"""Losses of hidden states through an LM head, a chunk of rows at a time, so that the logits [N, V] are never whole.

`chunked_sum` is for a training step, which knows before its forward pass how every loss will be weighed: it takes the
gradient of a chunk's logits while they exist. `chunked` knows no weights, and computes each chunk's logits again when a
gradient is asked for. Neither keeps logits, and both walk over the chunks in the same function.
"""

from collections.abc import Callable, Sequence
from typing import Any

from distill_kernels.head import DenseHead, Factors, Head
from distill_kernels.row_loss import Arrays, Autodiff, RowLoss, with_vjp

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map, tree_unflatten

Loss = RowLoss | Callable[..., mx.array | Arrays]

CHUNK_BYTES = 320 << 20
"""What the logits of a chunk and all that is computed from them may take, unless a caller says otherwise."""

ARRAYS_PER_CHUNK = 4
"""Arrays [n, V] that exist at the worst moment of a chunk, as measured: logits, gradient, and two on the way to it."""


def chunk_rows(vocab: int, budget_bytes: int = CHUNK_BYTES, dtype_bytes: int = 4) -> int:
    """Return how many rows make a chunk: budget / (4 · V · dtype_bytes), a multiple of 16 and at least 16.

    By default 128 rows at V = 151,936 and 416 at V = 49,152. The head, and its gradient where it trains, come on top.
    Larger chunks read the head less often: over 512 rows at V = 151,936, D = 1,024, on one CPU core, chunks of 48, 96,
    192 rows took 7.5, 6.6, 6.1 s where the head is frozen and 9.9, 9.3, 8.1 s where it trains.

    Args:
        vocab: V, the width of the head.
        budget_bytes: for everything of a chunk that is [n, V].
        dtype_bytes: of a logit inside the loss; 4 for the losses here, which compute in float32 whatever the model's.
    """
    return max(16, budget_bytes // (ARRAYS_PER_CHUNK * vocab * dtype_bytes) // 16 * 16)


def chunked_sum(
    loss: Loss,
    hidden: mx.array,
    head: Head,
    rows: Sequence[mx.array],
    cotangents: Sequence[mx.array],
    per_chunk: int | None = None,
) -> tuple[mx.array, Arrays]:
    """Return (sum_j sum_n cotangents[j][n] · losses_j[n], losses), losses = loss(head(hidden), *rows), in one pass.

    Each chunk gives its losses and, at once, the gradients of the sum by its hidden states and by the head's trainable
    parameters. So every logit is computed once and one chunk of them exists, and where the head is frozen nothing is
    done for its weights. The gradients are computed whether or not anyone asks: to evaluate, call `chunked`.

    A gradient of the sum flows to `hidden` and the trainable parameters, and from the losses' own forward pass to
    `cotangents` (not where one is 0: then the loss may be infinite and is left out), to whatever `loss` captured and to
    frozen parameters that are differentiated all the same (right, but then every chunk's logits are kept). The losses
    that are returned are for reports: none flows through them.

    Args:
        loss, hidden, head, rows, per_chunk: as for `chunked`.
        cotangents: for each loss an array [N].

    Raises:
        ValueError: the shapes do not fit, or the head cannot be split off.
    """
    row_loss, spans = _checked(loss, hidden, head, [*rows, *cotangents], per_chunk)
    params = head.module.trainable_parameters()
    fixed = mx.stop_gradient(hidden), tree_map(mx.stop_gradient, params), [mx.stop_gradient(r) for r in rows]
    weights = [mx.stop_gradient(c) for c in cotangents]
    losses, gradients = _backward(row_loss, head, spans, *fixed, weights)
    value = sum((mx.where(c != 0, c * x, 0).sum() for c, x in zip(cotangents, losses, strict=True)), mx.array(0.0))
    held = [gradients]

    def gradient(_primals: Any, cotangents: Any) -> Any:
        if not held:
            raise ValueError("this pass's gradient has been taken; call chunked_sum again for another")
        return tree_map(lambda g: g * cotangents[0].astype(g.dtype), held.pop())  # popped, it is scaled in place

    (total,) = _with_gradient((value,), (hidden, params), gradient)
    return total, tuple(mx.stop_gradient(x) for x in losses)


def chunked(loss: Loss, hidden: mx.array, head: Head, rows: Sequence[mx.array], per_chunk: int | None = None) -> Arrays:
    """Return loss(head(hidden), *rows), each [N], while only one chunk's logits exist at a time.

    Gradients flow to `hidden` and to the head's trainable parameters (tied or not, LoRA or not, under
    `nn.value_and_grad(model, ...)`), not to `rows`. The backward pass computes each chunk's logits again, and its
    gradient, from the few floats per row that the loss saved; parameters' gradients are summed in float32.

    Args:
        loss: a `RowLoss`, or any function of (logits [n, V], *rows) returning one [n] array or several.
        hidden: [N, D].
        head: as `split_head` gives it.
        rows: arrays of N rows, constants of the loss.
        per_chunk: rows whose logits exist together; by default `chunk_rows(V)`. Each chunk reads the head's whole
            weight, and adds to its whole gradient where it trains, so small ones cost time.

    Raises:
        ValueError: the shapes do not fit, or the head cannot be split off.
    """
    row_loss, spans = _checked(loss, hidden, head, rows, per_chunk)
    params = head.module.trainable_parameters()
    fixed = [mx.stop_gradient(r) for r in rows]
    losses, saved = _forward(row_loss, head, spans, mx.stop_gradient(hidden), tree_map(mx.stop_gradient, params), fixed)

    def gradient(primals: Any, cotangents: Any) -> Any:
        h = _after(primals[0], [*losses, *saved])  # else the first chunk is there again before the last one went
        return _backward(row_loss, head, spans, h, primals[1], fixed, cotangents, saved)[1]

    return _with_gradient(losses, (hidden, params), gradient)


def _with_gradient(values: Arrays, inputs: tuple[mx.array, Any], gradient: Callable[..., Any]) -> Arrays:
    """Return values that take nothing from the inputs, as if they did: with `gradient(inputs, cotangents)` added.

    What reaches the values on other ways, from arrays that a loss captured, stays MLX's own business.
    """

    def refused(*_: Any) -> Any:
        raise ValueError("a loss over chunks has a first derivative in reverse mode, and no other")

    def vjp(primals: Any, cotangents: Any, _outputs: Any) -> Any:
        return with_vjp(lambda found, *_: found, refused)(gradient(primals, cotangents), *primals)

    nothing = mx.custom_function(lambda *_: tuple(mx.zeros_like(value) for value in values))
    nothing.vjp(vjp)
    nothing.jvp(refused)
    zeros: Any = nothing(*inputs)
    return tuple(value + zero for value, zero in zip(values, zeros, strict=True))


def _forward(
    row_loss: RowLoss, head: Head, spans: list[slice], hidden: mx.array, params: Any, rows: Sequence[mx.array]
) -> tuple[Arrays, Arrays]:
    """Return (losses, saved) of all chunks."""
    parts: list[tuple[Arrays, Arrays]] = []
    for span in spans:
        h = _after(hidden[span], _arrays(parts[-1:]))
        parts.append(row_loss.forward(head.with_parameters(h, params), *(r[span] for r in rows)))
    return _joined(parts)


def _backward(
    row_loss: RowLoss,
    head: Head,
    spans: list[slice],
    hidden: mx.array,
    params: Any,
    rows: Sequence[mx.array],
    cotangents: Sequence[mx.array],
    saved: Arrays | None = None,
) -> tuple[Arrays, tuple[mx.array, Any]]:
    """Return (losses, gradients by hidden and params); with `saved` of a forward pass, that is spared: no losses."""
    trained: dict[str, mx.array] = dict(tree_flatten(params))
    dense = DenseHead.fits(head, trained, hidden)
    leaves = [name for name in trained if not (dense and name == "weight")]
    factors: Factors = []

    def logits(h: mx.array, *values: mx.array) -> mx.array:
        given = dict(zip(leaves, values, strict=True))
        if dense:
            return head(h, DenseHead(trained["weight"], given.get("bias"), factors))
        return head.with_parameters(h, tree_unflatten(list(given.items())))

    parts: list[tuple[Arrays, Arrays]] = []
    d_hidden: list[mx.array] = []
    totals: dict[str, mx.array] = {}
    for span in spans:
        h = _after(hidden[span], [*d_hidden[-1:], *totals.values(), *_arrays(parts[-1:])])
        inputs = [h, *(trained[name] for name in leaves)]
        known = None if saved is None else tuple(s[span] for s in saved)
        factors.clear()
        part, (dh, *grads) = _pull(
            row_loss, logits, inputs, [r[span] for r in rows], tuple(c[span] for c in cotangents), known
        )
        parts.append(part)
        d_hidden.append(dh)
        for name, g in zip(leaves, grads, strict=True):
            totals[name] = totals[name] + g if name in totals else g.astype(mx.float32)
        for x, dz in factors:
            pair = dz.astype(mx.float32).T, x.astype(mx.float32)
            totals["weight"] = mx.addmm(totals["weight"], *pair) if "weight" in totals else mx.matmul(*pair)
    d_params = [(name, totals[name].astype(trained[name].dtype)) for name in trained]
    return _joined(parts)[0], (mx.concatenate(d_hidden), tree_unflatten(d_params))


def _arrays(parts: list[tuple[Arrays, Arrays]]) -> list[mx.array]:
    return [array for losses, saved in parts for array in (*losses, *saved)]


def _joined(parts: list[tuple[Arrays, Arrays]]) -> tuple[Arrays, Arrays]:
    """Return the chunks' (losses, saved) as those of all rows."""
    losses, saved = (tuple(mx.concatenate(list(c)) for c in zip(*p, strict=True)) for p in zip(*parts, strict=True))
    return losses, saved


def _pull(
    row_loss: RowLoss,
    logits: Callable[..., mx.array],
    inputs: list[mx.array],
    rows: list[mx.array],
    cotangents: Arrays,
    saved: Arrays | None,
) -> tuple[tuple[Arrays, Arrays], list[mx.array]]:
    """Return (losses, saved) of one chunk's logits(*inputs), and its gradients by the inputs."""
    parts: list[tuple[Arrays, Arrays]] = []

    def pulled(*inputs: mx.array) -> mx.array:
        z = logits(*inputs)
        losses, kept = row_loss.forward(z, *rows) if saved is None else ((), saved)
        parts.append((losses, kept))

        def backward(z: mx.array, _cotangent: mx.array, _output: mx.array) -> mx.array:
            return row_loss.backward(z, *rows, saved=kept, cotangents=cotangents)

        nothing: mx.array = with_vjp(lambda _: mx.zeros(()), backward)(z)
        return nothing

    _, gradients = mx.vjp(pulled, inputs, [mx.array(1.0)])
    return parts[0], gradients


def _after(x: mx.array, done: list[mx.array]) -> mx.array:
    """Return x, to be computed on only when `done` is: else MLX's breadth-first order makes all chunks at once."""
    return mx.depends([x], [mx.stop_gradient(a) for a in done])[0] if done else x


def _checked(
    loss: Loss, hidden: mx.array, head: Head, rows: Sequence[mx.array], per_chunk: int | None
) -> tuple[RowLoss, list[slice]]:
    """Return the loss as a `RowLoss`, and the chunks."""
    if head.reason is not None:
        raise ValueError(f"no head apart from its model: {head.reason}")
    fits = hidden.ndim == 2 and len(hidden) and all(r.ndim and len(r) == len(hidden) for r in rows)
    if not fits or (per_chunk is not None and per_chunk < 1):
        shapes = [r.shape for r in rows]
        raise ValueError(
            f"hidden [N >= 1, D], rows [N, ...], per_chunk >= 1; found {hidden.shape}, {shapes}, {per_chunk}"
        )
    per_chunk = per_chunk or chunk_rows(head(hidden[:1]).shape[-1])  # a shape is known without computing it
    spans = [slice(at, at + per_chunk) for at in range(0, len(hidden), per_chunk)]
    return loss if isinstance(loss, RowLoss) else Autodiff(loss), spans
