"""What an LM head's raw output goes through before a loss: scale, soft cap, padding, temperature; weights of rows."""

from dataclasses import dataclass
from typing import ClassVar, TypedDict

from distill_kernels.row_loss import Arrays, RowLoss
from distill_kernels.row_ops import check_vectors

import mlx.core as mx


class LogitsOptions(TypedDict, total=False):
    """What `LogitsLoss` takes, as keywords of the functions that wrap one."""

    scale: float
    softcap: float | None
    vocab_size: int | None


@dataclass(frozen=True)
class LogitsLoss(RowLoss):
    """A row loss of what an LM head puts out: everything between those raw logits and a softmax is part of the loss.

        z = softcap · tanh(scale · logits / softcap),   or scale · logits without a softcap;   q = softmax(z / T)

    A subclass says `value` and `slope` in terms of z. Gradients are by the raw logits: dz · scale · (1 - tanh²).

    After its own rows a loss takes one more, `row_weights` [N], which multiplies each of its losses. A row of weight 0
    touches nothing: its losses and its gradient are exactly 0, whatever (NaN, inf) its logits and targets hold.

    Attributes:
        temperature: T > 0; of the soft targets, not of the cross-entropy to a label.
        scale: > 0 (Cohere, Granite).
        softcap: > 0 (Gemma); a -inf logit becomes -softcap, which is finite, so mask after it or not at all.
        vocab_size: columns from here on are padding of the LM head: in no softmax, and their gradient is 0.
    """

    names: ClassVar[tuple[str, ...]] = ()  # the rows, in order

    temperature: float = 1.0
    scale: float = 1.0
    softcap: float | None = None
    vocab_size: int | None = None

    def __post_init__(self) -> None:
        for name in ("temperature", "scale", "softcap", "vocab_size"):
            found = getattr(self, name)
            if found is not None and not found > 0:
                raise ValueError(f"{name} must be above 0, found {found}")

    def value(self, z: mx.array, *targets: mx.array) -> tuple[Arrays, Arrays]:
        """Return (losses, saved) of z [N, V] float32."""
        raise NotImplementedError

    def slope(self, z: mx.array, *targets: mx.array, saved: Arrays, cotangents: Arrays) -> mx.array:
        """Return sum_j cotangents[j] · d losses[j] / dz, [N, V] float32."""
        raise NotImplementedError

    def forward(self, logits: mx.array, *rows: mx.array) -> tuple[Arrays, Arrays]:
        targets, row_weights = self.parted(logits, rows, self.names)
        losses, saved = self.value(self._final(logits), *targets)
        return weighed(losses, row_weights), saved

    def backward(self, logits: mx.array, *rows: mx.array, saved: Arrays, cotangents: Arrays) -> mx.array:
        targets, row_weights = self.parted(logits, rows, self.names)
        z = self._final(logits)
        dz = self.slope(z, *targets, saved=saved, cotangents=weighed(cotangents, row_weights))
        if self.softcap is not None:
            dz = dz * (self.scale * (1 - mx.square(z / self.softcap)))
        elif self.scale != 1:
            dz = dz * self.scale
        if row_weights is not None:
            dz = mx.where((row_weights != 0)[:, None], dz, 0)
        padding = logits.shape[1] - dz.shape[1]
        return (mx.pad(dz, [(0, 0), (0, padding)]) if padding else dz).astype(logits.dtype)

    def _final(self, logits: mx.array) -> mx.array:
        """Return z, [N, vocab_size] float32."""
        return self.capped(logits[:, : self.vocab_size].astype(mx.float32))

    def capped(self, z: mx.array) -> mx.array:
        """Return float32 logits, of whichever columns, scaled and capped."""
        z = z if self.scale == 1 else z * self.scale
        return z if self.softcap is None else self.softcap * mx.tanh(z / self.softcap)

    def parted(self, logits: mx.array, rows: Arrays, names: tuple[str, ...]) -> tuple[Arrays, mx.array | None]:
        """Return (targets, row weights or None)."""
        if logits.ndim != 2 or not len(logits) or logits.shape[1] < (self.vocab_size or 1):
            raise ValueError(f"logits must be [N >= 1, V >= {self.vocab_size or 1}], found shape {logits.shape}")
        targets, extra = rows[: len(names)], rows[len(names) :]
        if len(targets) < len(names) or len(extra) > 1:
            raise ValueError(f"rows must be {', '.join(names)}[, row_weights]; found {len(rows)} arrays")
        if extra:
            check_vectors(logits, {"row_weights": extra[0]})
        return targets, extra[0] if extra else None


def weighed(arrays: Arrays, row_weights: mx.array | None) -> Arrays:
    """Return each array times the weights, and exactly 0 where a weight is."""
    if row_weights is None:
        return arrays
    return tuple(mx.where(row_weights != 0, a * row_weights.astype(mx.float32), 0) for a in arrays)
