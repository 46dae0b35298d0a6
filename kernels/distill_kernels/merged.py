"""A loss that sees some columns of the vocabulary as one: tokens that the teacher has no name for.

Between two tokenizers only a part of the student's tokens has an equal among the teacher's. The teacher can say nothing
of the others one by one, and what it gave to tokens that the student lacks can be compared with all of them together.
"""

from dataclasses import dataclass

from distill_kernels.logits_loss import LogitsLoss
from distill_kernels.row_loss import Arrays, RowLoss
from distill_kernels.row_ops import add_at_ids, cross_entropy, in_vocabulary, log_sum_exp
from distill_kernels.tier import on_tier
from distill_kernels.weighted import WeightedLoss

import mlx.core as mx


@dataclass(frozen=True, eq=False)
class MergedLoss(RowLoss):
    """A loss of z', where some columns M of the logits z are one, at the column `cell`; and cross-entropy of z itself.

        z'_cell = T · log sum_{j in M} exp(z_j / T),   z'_j = -inf elsewhere in M,   z'_j = z_j outside M

    So softmax(z' / T) is the student's distribution over the tokens outside M and one cell for those in M; a target
    names that cell by the id `cell`. With d = d kd / dz', by the chain rule:

        dz_j = d_j outside M,   d_cell · exp(z_j / T) / sum_{i in M} exp(z_i / T) inside

    Attributes:
        inner: the loss of z'.
        mask: bool [V]; M.
        cell: one of M.
    """

    inner: LogitsLoss | WeightedLoss
    mask: mx.array
    cell: int

    @property
    def names(self) -> tuple[str, ...]:
        """The rows that it takes, in order: those of `inner`."""
        return self.inner.names

    @property
    def temperature(self) -> float:
        """T of the loss, or of all its terms."""
        return self.inner.terms[0][1].temperature if isinstance(self.inner, WeightedLoss) else self.inner.temperature

    def forward(self, logits: mx.array, *rows: mx.array) -> tuple[Arrays, Arrays]:
        """See `RowLoss.forward`: (kd, ce)."""
        z = logits.astype(mx.float32)
        lse_of_m = log_sum_exp(mx.where(self.mask, z / self.temperature, -mx.inf))
        targets, labels = self._parted(rows)
        (kd, _), saved = on_tier(self.inner).forward(self._merged(z, lse_of_m), *targets)
        lse = log_sum_exp(z)
        return (kd, cross_entropy(z, labels, lse)), (*saved, lse, lse_of_m)

    def backward(self, logits: mx.array, *rows: mx.array, saved: Arrays, cotangents: Arrays) -> mx.array:
        """See `RowLoss.backward`."""
        *own, lse, lse_of_m = saved
        ct_kd, ct_ce = cotangents
        z = logits.astype(mx.float32)
        targets, labels = self._parted(rows)
        d = on_tier(self.inner).backward(
            self._merged(z, lse_of_m), *targets, saved=tuple(own), cotangents=(ct_kd, mx.zeros_like(ct_ce))
        )
        share = mx.exp(z / self.temperature - lse_of_m[:, None])
        d = mx.where(self.mask, share * d[:, self.cell : self.cell + 1], d)
        known, labels = in_vocabulary(labels, z.shape[1])
        ct = mx.where(known, ct_ce, 0)[:, None]
        return add_at_ids(d + ct * mx.exp(z - lse[:, None]), labels[:, None], -ct).astype(logits.dtype)

    def _merged(self, z: mx.array, lse_of_m: mx.array) -> mx.array:
        """Return z'."""
        is_cell = mx.arange(z.shape[1]) == self.cell
        return mx.where(self.mask, mx.where(is_cell, self.temperature * lse_of_m[:, None], -mx.inf), z)

    def _parted(self, rows: Arrays) -> tuple[list[mx.array], mx.array]:
        """Return the rows with -1 for each label, whose column z' may lack, and the labels."""
        at = self.names.index("labels")
        targets = list(rows)
        targets[at] = mx.full(rows[at].shape, -1, mx.int32)
        return targets, rows[at]
