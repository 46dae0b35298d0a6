"""The LM head apart from its model, so that the logits [batch, seq, vocab] are never whole.

Two ideas: a `Head` is the model's own forward pass with the trunk replaced by one that returns given hidden states, and
`chunked` walks over rows of them, computing each chunk's logits twice (loss, then gradient) and keeping none.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from distill_kernels.row_loss import Arrays, Autodiff, RowLoss, with_vjp

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx.nn.layers.dropout import Dropout
from mlx.utils import tree_flatten, tree_unflatten


@dataclass(frozen=True)
class Head:
    """A causal LM in two parts: `trunk(tokens)` gives hidden states, `head(hidden)` logits; together they are it.

    It holds the model, not copies: parameters that `nn.value_and_grad` or an optimizer put into the model are seen.
    """

    model: Module
    reason: str | None = None  # why the model cannot be split; then take its whole logits

    @property
    def _owner(self) -> Any:
        return self.model.language_model if "language_model" in self.model else self.model

    @property
    def module(self) -> Any:
        """The one module whose parameters the head uses: `lm_head`, or the embedding where they are tied."""
        owner = self._owner
        return owner.lm_head if "lm_head" in owner else owner.model.embed_tokens

    def trunk(self, tokens: mx.array) -> mx.array:
        """Return the last hidden states [B, T, D] of tokens [B, T], after the final norm."""
        hidden: mx.array = self._owner.model(tokens)
        return hidden

    def __call__(self, hidden: mx.array) -> mx.array:
        """Return the logits [N, V] of hidden states [N, D], with whatever scale or cap the model puts on them."""
        owner = self._owner
        shell = copy.copy(owner)
        shell.clear()  # a module is a dict of its parts: out of reach, they cannot take part unnoticed
        if "lm_head" in owner:
            shell.lm_head = owner.lm_head
        shell.model = _Returns(hidden[None], owner.model)
        logits: mx.array = shell(mx.zeros((1, len(hidden)), dtype=mx.int32))
        return logits.squeeze(0)  # an index would cost its gradient a pass over the logits


class _Returns:
    """Stands where the trunk was: returns the hidden states, and lends its embedding and its settings, nothing else."""

    def __init__(self, hidden: mx.array, trunk: Module) -> None:
        self._hidden, self._trunk = hidden, trunk

    def __call__(self, *_args: object, **_kwargs: object) -> mx.array:
        return self._hidden

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._trunk, name)
        if name != "embed_tokens" and isinstance(value, (Module, mx.array, list)):
            raise AttributeError(f"its head uses model.{name}")
        return value


def split_head(model: Module, tolerance: float = 1e-3) -> Head:
    """Return the model as trunk and head; `reason` says why not, where it cannot be split.

    The split is tried on a probe of four tokens rather than guessed from a name: trunk, then head must give the model's
    own logits to `tolerance` of their largest absolute value. Fits mlx-lm's models with a `model`, and an `lm_head` or
    a tied `model.embed_tokens`: quantised, with LoRA, with a logit scale or soft cap. Dropout in the head does not fit:
    the backward pass would draw another mask.
    """
    head, tokens = Head(model), mx.array([[0, 1, 2, 1]])
    every: Any = model.modules  # parents before their children
    modes = [(module, module.training) for module in every()]
    try:
        if any(isinstance(m, Dropout) and m._p_1 < 1 for m in head.module.modules()):
            return Head(model, "its head has dropout, which the backward pass would draw again")
        model.eval()  # dropout in the trunk would fall differently in the two passes
        whole = model(tokens)[0].astype(mx.float32)
        parts = head(head.trunk(tokens)[0]).astype(mx.float32)
        if parts.shape != whole.shape or mx.abs(parts - whole).max() > tolerance * mx.abs(whole).max():
            return Head(model, "its logits are not those of its trunk and head in turn")
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        return Head(model, f"it is not a `model` under an `lm_head` or tied `embed_tokens`: {error}")
    finally:
        for module, training in modes:
            module.train(training)
    return head


def chunked(
    loss: RowLoss | Callable[..., mx.array | Arrays],
    hidden: mx.array,
    head: Head,
    rows: Sequence[mx.array],
    chunk_rows: int,
) -> Arrays:
    """Return loss(head(hidden), *rows), each [N], while only one chunk's logits exist at a time.

    Gradients flow to `hidden` and to the head's trainable parameters (tied or not, LoRA or not, under
    `nn.value_and_grad(model, ...)`), not to `rows`. The backward pass computes each chunk's logits again, and its
    gradient, from the few floats per row that the loss saved; parameters' gradients are summed in float32.

    Args:
        loss: a `RowLoss`, or any function of (logits [n, V], *rows) returning one [n] array or several.
        hidden: [N, D].
        head: as `split_head` gives it.
        rows: arrays of N rows, constants of the loss.
        chunk_rows: rows whose logits exist together. Each chunk adds to the head's whole weight gradient, so small ones
            cost time: on 2 CPU cores a gradient over 512 rows, D = 576, V = 49,152 takes 1.01 of the time of
            `nn.losses.cross_entropy` on whole logits in chunks of 256 rows, 1.15 in 128, 1.4 in 64.

    Raises:
        ValueError: the shapes do not fit, or the head cannot be split off.
    """
    if head.reason is not None:
        raise ValueError(f"no head apart from its model: {head.reason}")
    if hidden.ndim != 2 or not len(hidden) or chunk_rows < 1 or any(len(r) != len(hidden) for r in rows):
        shapes = [r.shape for r in rows]
        raise ValueError(
            f"hidden [N >= 1, D], rows [N, ...], chunk_rows >= 1; found {hidden.shape}, {shapes}, {chunk_rows}"
        )
    row_loss = loss if isinstance(loss, RowLoss) else Autodiff(loss)
    spans = [slice(at, at + chunk_rows) for at in range(0, len(hidden), chunk_rows)]

    def forward(hidden: mx.array, params: Any, *rows: mx.array) -> tuple[Arrays, Arrays]:
        parts: list[tuple[Arrays, Arrays]] = []
        for span in spans:
            h = _after(hidden[span], [a for half in parts[-1:] for arrays in half for a in arrays])
            parts.append(row_loss.forward(_logits(head, h, params), *(r[span] for r in rows)))
        losses, saved = zip(*parts, strict=True)
        return _joined(losses), _joined(saved)

    def backward(primals: Any, cotangents: tuple[Arrays, Arrays], outputs: tuple[Arrays, Arrays]) -> Any:
        hidden, params, *rows = primals
        flat: dict[str, mx.array] = dict(tree_flatten(params))
        d_hidden: list[mx.array] = []
        totals: list[mx.array] = []
        for span in spans:

            def losses(h: mx.array, *leaves: mx.array, span: slice = span) -> list[mx.array]:
                logits = _logits(head, h, tree_unflatten(list(zip(flat, leaves, strict=True))))
                return list(row_loss(logits, *(r[span] for r in rows), saved=tuple(s[span] for s in outputs[1])))

            h = _after(hidden[span], [*d_hidden[-1:], *totals])
            _, (dh, *grads) = mx.vjp(losses, [h, *flat.values()], [c[span] for c in cotangents[0]])
            grads = [g.astype(mx.float32) for g in grads]
            totals = [t + g for t, g in zip(totals, grads, strict=True)] if totals else grads
            d_hidden.append(dh)
        d_params = [(name, t.astype(p.dtype)) for (name, p), t in zip(flat.items(), totals, strict=True)]
        return mx.concatenate(d_hidden), tree_unflatten(d_params)

    losses: Arrays = with_vjp(forward, backward)(hidden, head.module.trainable_parameters(), *rows)[0]
    return losses


def _logits(head: Head, hidden: mx.array, params: Any) -> mx.array:
    """Return head(hidden) with these trainable parameters, and leave in the module those it had."""
    module = head.module
    before = module.trainable_parameters()
    module.update(params)
    try:
        return head(hidden)
    finally:
        module.update(before)


def _joined(parts: Sequence[Arrays]) -> Arrays:
    """Return the chunks' arrays as whole ones."""
    return tuple(mx.concatenate(list(chunks)) for chunks in zip(*parts, strict=True))


def _after(x: mx.array, done: list[mx.array]) -> mx.array:
    """Return x, to be computed on only when `done` is: else MLX's breadth-first order makes all chunks at once."""
    return mx.depends([x], done)[0] if done else x
