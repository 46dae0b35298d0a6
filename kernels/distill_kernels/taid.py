"""TAID: forward KL to a target that lies between the student, as it is now, and a truncated teacher; and cross-entropy.

The target is a constant of the step, so the gradient is the bucket KL's with other numbers in place of the teacher's:
value and target are a few operations on [N, k + 1] cells here, and every pass over the logits is `bucket`'s own.
"""

from dataclasses import dataclass, field
from typing import ClassVar

from distill_kernels.bucket import BucketKL, log_student_cells
from distill_kernels.logits_loss import LogitsLoss, weighed
from distill_kernels.row_loss import Arrays, RowLoss
from distill_kernels.row_ops import at_ids, check_sparse, counted
from distill_kernels.tier import on_tier

import mlx.core as mx

LEAST = 1e-37
"""Of a kept token's target in the gradient, so that its id is still told from the tail's."""


@dataclass(frozen=True)
class TaidLoss(LogitsLoss):
    """Rows (ids, weights, log_tail_mass, labels[, row_weights]) -> (kd, ce), each [N] float32.

        log p_t = (1 - t) log q + t log p, less its LSE over the cells;   cells: the kept ids S, and one for the tail
        kd = T² · sum_cells p_t log(p_t / q),   q = softmax(z / T);   ce as in `bucket_loss_ce`
        dz = ct_kd · T · (q - p_t)              on S
           = ct_kd · T · q (1 - p_t,T / q_T)    off S

    Where every token is a cell this is the paper's target softmax((1 - t) sg(z) + t z_teacher) at T = 1: a constant of
    the row cancels, so log-probs serve as well as logits. One cell for the tail takes the teacher to be shaped there
    like the student, so the tail's target is too large. On Zipf-like logits at V = 50,000 the gradient is 17, 4.8 and
    1.9 degrees off the dense one at t = 0.4 with k = 8, 50 and 200 (at t = 1: 10, 1.9, 0.5), and 57, 83 and 92 % of the
    value is seen. Between random tiny models, whose mass is mostly tail, 61, 42 and 21 degrees: `tools/bench_taid.py`.

    t = 0 is the student itself: kd and its gradient are 0 but for rounding. t = 1 is the bucket's forward KL, where the
    teacher's cells sum to 1. Undefined where no cell is possible for both. t is in no kernel's source, only in the
    targets that a kernel reads, so one that moves compiles nothing.

    Attributes:
        interpolation: t, 0 to 1.

    Reference: Shing et al., "TAID: Temporally Adaptive Interpolated Distillation", ICLR 2025, equations 2 to 4.
    """

    names: ClassVar = BucketKL.names

    interpolation: float = field(default=1.0, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.interpolation <= 1:
            raise ValueError(f"interpolation must lie in [0, 1], found {self.interpolation}")

    def forward(self, logits: mx.array, *rows: mx.array) -> tuple[Arrays, Arrays]:
        """See `RowLoss.forward`: saved is what the bucket KL saves on its tier."""
        (ids, weights, log_tail, labels), row_weights = self.parted(logits, rows, self.names)
        check_sparse(logits, ids, weights, log_tail_mass=log_tail, labels=labels)
        (_, ce), saved = self._bucket.forward(logits, *rows)
        log_q, log_p = self._log_cells(logits, ids, weights, log_tail, saved)
        p = mx.exp(log_p)
        kd = self.temperature**2 * mx.where(p > 0, p * (log_p - log_q), 0).sum(axis=-1)
        return (*weighed((kd,), row_weights), ce), saved

    def backward(self, logits: mx.array, *rows: mx.array, saved: Arrays, cotangents: Arrays) -> mx.array:
        """See `RowLoss.backward`."""
        ids, weights, log_tail, *others = rows
        _, log_p = self._log_cells(logits, ids, weights, log_tail, saved)
        inside = counted(ids, weights, self.vocab_size or logits.shape[1])[1] > 0
        p = mx.where(inside, mx.maximum(mx.exp(log_p[:, :-1]), LEAST), 0)
        if len(saved) == 1:  # a kernel keeps, fourth, the sum of the slopes, and the teacher's is not the target's
            total = -(p.sum(axis=-1) + mx.exp(log_p[:, -1]))
            saved = (mx.concatenate([saved[0][:, :3], total[:, None]], axis=-1),)
        return self._bucket.backward(logits, ids, p, log_p[:, -1], *others, saved=saved, cotangents=cotangents)

    @property
    def _bucket(self) -> RowLoss:
        return on_tier(BucketKL(self.temperature, self.scale, self.softcap, self.vocab_size))

    def _log_cells(
        self, logits: mx.array, ids: mx.array, weights: mx.array, log_tail: mx.array, saved: Arrays
    ) -> tuple[mx.array, mx.array]:
        """Return (log q, log p_t) of the kept cells and, last, of the tail: [N, k + 1] each, -inf for padding."""
        _, lse_kept, lse_rest = saved if len(saved) == 3 else (saved[0][:, i] for i in range(3))
        ids, p = counted(ids, weights, self.vocab_size or logits.shape[1])
        log_q, log_q_tail = log_student_cells(self.capped(at_ids(logits, ids)) / self.temperature, lse_kept, lse_rest)
        tail = log_tail.astype(mx.float32)[:, None]
        log_q = mx.concatenate([mx.where(p > 0, log_q, -mx.inf), log_q_tail[:, None]], axis=-1)
        log_p = mx.concatenate([mx.log(p), tail], axis=-1)
        t = self.interpolation
        mixed = log_p if t == 1 else log_q if t == 0 else (1 - t) * log_q + t * log_p
        return log_q, mixed - mx.logsumexp(mixed, axis=-1, keepdims=True)
