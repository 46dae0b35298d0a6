"""Several losses of the same logits as one: their distillation terms weighted and summed, cross-entropy once."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from distill_kernels.logits_loss import LogitsLoss
from distill_kernels.row_loss import Arrays, RowLoss
from distill_kernels.tier import on_tier

import mlx.core as mx


@dataclass(frozen=True)
class WeightedLoss(RowLoss):
    """sum_j weight_j · kd_j, and ce, over the rows that any of the losses takes, `names`; each on the tier that runs.

    Raises:
        ValueError: there is no loss, or one takes what is not sparse.
    """

    terms: tuple[tuple[float, LogitsLoss], ...]

    ORDER: ClassVar = ("ids", "weights", "log_probs", "log_tail_mass", "labels")

    def __post_init__(self) -> None:
        if not self.terms or any(set(loss.names) - set(self.ORDER) for _, loss in self.terms):
            raise ValueError(f"terms must be losses on rows {', '.join(self.ORDER)}, found {self.terms}")

    @property
    def names(self) -> tuple[str, ...]:
        """The rows, in order."""
        taken = {name for _, loss in self.terms for name in loss.names}
        return tuple(name for name in self.ORDER if name in taken)

    def forward(self, logits: mx.array, *rows: mx.array) -> tuple[Arrays, Arrays]:
        """See `RowLoss.forward`: (kd, ce), and for each loss what it saves, as one array."""
        found = [on_tier(loss).forward(logits, *self._rows(loss, rows)) for _, loss in self.terms]
        kds = [weight * losses[0] for (weight, _), (losses, _) in zip(self.terms, found, strict=True)]
        ce = found[0][0][1]
        return (mx.stack(kds).sum(axis=0), ce), tuple(mx.stack(list(saved), axis=1) for _, saved in found)

    def backward(self, logits: mx.array, *rows: mx.array, saved: Arrays, cotangents: Arrays) -> mx.array:
        """See `RowLoss.backward`."""
        kd, ce = cotangents
        total = mx.zeros(logits.shape)
        for (weight, loss), own in zip(self.terms, saved, strict=True):
            parts = tuple(own[:, i] for i in range(own.shape[1]))
            dz = on_tier(loss).backward(logits, *self._rows(loss, rows), saved=parts, cotangents=(weight * kd, ce))
            total, ce = total + dz.astype(mx.float32), mx.zeros_like(ce)  # cross-entropy is asked for once
        return total.astype(logits.dtype)

    def _rows(self, loss: LogitsLoss, rows: Sequence[mx.array]) -> list[mx.array]:
        """The rows of one loss, row weights after them where there are any."""
        named = dict(zip(self.names, rows, strict=False))
        return [*(named[name] for name in loss.names), *rows[len(self.names) :]]
