"""Divergences from a teacher whose logits are at hand whole, every token a cell; and cross-entropy in the same pass.

For a live teacher on one machine, and as the truth that the sparse losses approach. Nothing is stored of it.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar, Unpack

from distill_kernels.divergence import Divergence, ForwardKL
from distill_kernels.logits_loss import LogitsLoss, LogitsOptions
from distill_kernels.row_loss import Arrays
from distill_kernels.row_ops import (
    add_at_ids,
    check_vectors,
    cross_entropy,
    in_vocabulary,
    log_sum_exp,
    normalisers,
    row_sum,
)
from distill_kernels.tier import Tier, kd_and_ce

import mlx.core as mx


@dataclass(frozen=True)
class DenseLoss(LogitsLoss):
    """`dense_loss_ce` as a `RowLoss` over rows (teacher_logits, labels[, row_weights])."""

    names: ClassVar = ("teacher_logits", "labels")

    divergence: Divergence = field(default=ForwardKL(), kw_only=True)

    def value(self, z: mx.array, *targets: mx.array) -> tuple[Arrays, Arrays]:
        teacher, labels = self.teacher_columns(targets[0], z.shape).astype(mx.float32), targets[1]
        check_vectors(z, {"labels": labels})
        t = self.temperature
        lse, lse_t = normalisers(z, t)
        lse_p = log_sum_exp(teacher / t)
        cells = self._cells(z, teacher, lse_t, lse_p)
        total = row_sum(self.divergence.slope(*cells))
        kd = t * t * row_sum(self.divergence.value(*cells))
        return (kd, cross_entropy(z, labels, lse)), (lse, lse_t, lse_p, total)

    def slope(self, z: mx.array, *targets: mx.array, saved: Arrays, cotangents: Arrays) -> mx.array:
        teacher, labels = self.teacher_columns(targets[0], z.shape).astype(mx.float32), targets[1]
        (lse, lse_t, lse_p, total), (ct_kd, ct_ce) = saved, cotangents
        labelled, labels = in_vocabulary(labels, z.shape[1])
        a, b = (self.temperature * ct_kd)[:, None], (ct_ce * labelled)[:, None]
        cells = self._cells(z, teacher, lse_t, lse_p)
        dz = a * (self.divergence.slope(*cells) - cells[2] * total[:, None])
        dz = mx.where(a != 0, dz, 0)  # a row whose divergence nobody asks for may have an infinite one
        return add_at_ids(dz + b * mx.exp(z - lse[:, None]), labels[:, None], -b)

    def teacher_columns(self, teacher: mx.array, shape: tuple[int, ...]) -> mx.array:
        """Return the teacher's logits of the student's columns, whose shape is given.

        Raises:
            ValueError: it has others.
        """
        if teacher.ndim == 2 and self.vocab_size is not None:
            teacher = teacher[:, : self.vocab_size]
        if teacher.shape != shape:
            raise ValueError(f"teacher_logits must be {list(shape)}, found {list(teacher.shape)}")
        return teacher

    def _cells(
        self, z: mx.array, teacher: mx.array, lse_t: mx.array, lse_p: mx.array
    ) -> tuple[mx.array, mx.array, mx.array, mx.array]:
        """Return (p, log p, q, log q), [N, V] each."""
        log_p = teacher / self.temperature - lse_p[:, None]
        log_q = z / self.temperature - lse_t[:, None]
        return mx.exp(log_p), log_p, mx.exp(log_q), log_q


def dense_loss_ce(
    logits: mx.array,
    teacher_logits: mx.array,
    labels: mx.array,
    divergence: Divergence,
    temperature: float = 1.0,
    row_weights: mx.array | None = None,
    tier: Tier | None = None,
    **options: Unpack[LogitsOptions],
) -> tuple[mx.array, mx.array]:
    """Return (kd, ce), each [N] float32, of the student's logits.

        kd = T² · sum_v f(p_v, q_v),   p = softmax(teacher_logits / T),  q = softmax(z / T)
        ce = LSE(z) - z_label;  0 for a label outside [0, V)

    f is the divergence's value of a cell. -inf logits on either side, or on both, take the limits: 0 · log 0 = 0; a
    forward KL is infinite where only q is 0, a reverse KL where only p is. The teacher's logits are final: scale and
    softcap are the student's, and no gradient goes to them.

    Gradient, by hand, from four saved floats per row, in the logits' dtype, with h = q · df/dq and G = sum_v h_v:

        dz = ct_kd · T · (h - q G) + ct_ce · (softmax(z) - onehot(label))

    Args:
        logits: [N, V], any float dtype; the arithmetic is float32. z is made of them by the options.
        teacher_logits: [N, V], any float dtype. With a `vocab_size` its width may differ: only those columns count.
        labels: [N] int32.
        divergence: one of `divergence`'s.
        temperature: T > 0.
        row_weights: [N], a factor of each row's losses; a row of weight 0 touches nothing, even when it holds NaN.
        tier: "ops", "metal", or the one that runs here: see `tier.on_tier`.
        options: scale, softcap, vocab_size: see `LogitsLoss`.

    Raises:
        ValueError: the shapes do not fit, or an option is not above 0.
    """
    return kd_and_ce(
        DenseLoss(temperature, **options, divergence=divergence),
        tier,
        logits,
        teacher_logits,
        labels,
        row_weights=row_weights,
    )


dense_loss_ce_ops, dense_loss_ce_kernel = partial(dense_loss_ce, tier="ops"), partial(dense_loss_ce, tier="metal")
