"""The LM head apart from its model, so that `fused_head` can make the logits of some positions at a time.

A `Head` is the model's own forward pass with the trunk replaced by one that returns given hidden states: whatever scale
or cap a model puts on its logits is there without being known here. `split_head` tries it on the model before anyone
relies on it.
"""

import copy
from dataclasses import dataclass
from typing import Any

from distill_kernels.row_loss import with_vjp

import mlx.core as mx
import mlx.nn as nn
from mlx.nn.layers.base import Module
from mlx.nn.layers.dropout import Dropout

Factors = list[tuple[mx.array, mx.array]]


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

    def trunk(self, tokens: mx.array, cache: Any = None) -> mx.array:
        """Return the last hidden states [B, T, D] of tokens [B, T], after the final norm.

        Args:
            cache: one for each layer, as the model takes them.
        """
        hidden: mx.array = self._owner.model(tokens) if cache is None else self._owner.model(tokens, cache)
        return hidden

    def __call__(self, hidden: mx.array, module: Any = None) -> mx.array:
        """Return the logits [N, V] of hidden states [N, D], with whatever scale or cap the model puts on them.

        Another `module` may stand in for the head's own: what can be called, or has `as_linear` where they are tied.
        """
        owner = self._owner
        shell = copy.copy(owner)
        shell.clear()  # a module is a dict of its parts: out of reach, they cannot take part unnoticed
        tied = "lm_head" not in owner
        if not tied:
            shell.lm_head = owner.lm_head if module is None else module
        shell.model = _Returns(hidden[None], owner.model, module if tied else None)
        logits: mx.array = shell(mx.zeros((1, len(hidden)), dtype=mx.int32))
        return logits.squeeze(0)  # an index would cost its gradient a pass over the logits

    def with_parameters(self, hidden: mx.array, params: Any) -> mx.array:
        """Return the logits that these trainable parameters give, and leave in the model those it had."""
        module = self.module
        before = module.trainable_parameters()
        module.update(params)
        try:
            return self(hidden)
        finally:
            module.update(before)


class _Returns:
    """Stands where the trunk was: returns the hidden states, and lends its embedding and its settings, nothing else."""

    def __init__(self, hidden: mx.array, trunk: Module, embedding: Any) -> None:
        self._hidden, self._trunk, self._embedding = hidden, trunk, embedding

    def __call__(self, *_args: object, **_kwargs: object) -> mx.array:
        return self._hidden

    def __getattr__(self, name: str) -> Any:
        if name == "embed_tokens" and self._embedding is not None:
            return self._embedding
        value = getattr(self._trunk, name)
        if name != "embed_tokens" and isinstance(value, (Module, mx.array, list)):
            raise AttributeError(f"its head uses model.{name}")
        return value


class DenseHead:
    """A dense head whose weight trains, as a multiplication that notes (x, dz) and leaves dz.T @ x to its caller.

    So the caller adds it into a sum by `mx.addmm`, which on the CPU happens in place. Adding products instead holds one
    more array as large as the weight and took 1.3 of the time of a pass (V = 20,000, D = 1,024, chunks of 64 rows).
    """

    def __init__(self, weight: mx.array, bias: mx.array | None, factors: Factors) -> None:
        self._weight, self._bias, self._factors = weight, bias, factors

    @classmethod
    def fits(cls, head: Head, trained: dict[str, mx.array], hidden: mx.array) -> bool:
        """Whether the head's weight trains, is dense, and is read by nothing but a call of its own module."""
        if "weight" not in trained or type(head.module) not in (nn.Linear, nn.Embedding):
            return False
        try:
            head(hidden[:1], cls(trained["weight"], trained.get("bias"), []))
        except AttributeError:
            return False
        return True

    def __call__(self, x: mx.array) -> mx.array:
        weight, factors = self._weight, self._factors

        def backward(x: mx.array, dz: mx.array, _output: mx.array) -> mx.array:
            factors.append((x.reshape(-1, x.shape[-1]), dz.reshape(-1, dz.shape[-1])))
            return dz @ weight

        y: mx.array = with_vjp(lambda x: x @ weight.T, backward)(x)
        return y if self._bias is None else y + self._bias

    as_linear = __call__


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
