"""How far apart two distributions are, whatever their tokens are called: largest against largest."""

from dataclasses import dataclass
from typing import ClassVar

from distill_kernels.bucket import BucketLoss
from distill_kernels.divergence import TVD
from distill_kernels.row_loss import Arrays, RowLoss
from distill_kernels.tier import on_tier

import mlx.core as mx


def largest(logits: mx.array, among: mx.array, n: int) -> mx.array:
    """Return the columns of the n largest logits of a row, [N, n], the largest first; -inf is the least of all.

    Args:
        logits: [N, V].
        among: bool [V]; the columns that are looked at, at least n of them.
        n: at least 1.
    """
    z = mx.where(among, -mx.stop_gradient(logits).astype(mx.float32), mx.inf)
    first = mx.argpartition(z, n - 1, axis=-1)[:, :n]
    order = mx.argsort(mx.take_along_axis(z, first, axis=-1), axis=-1)
    return mx.take_along_axis(first, order, axis=-1)


@dataclass(frozen=True, eq=False)
class SortedL1(RowLoss):
    """Universal logit distillation from a truncated teacher: sorted probabilities, L1; and cross-entropy.

        kd = T² · (sum_{i <= n} |p_(i) - q_(i)| + |p_T - q_T|),   q = softmax(z / T)
        ce = LSE(z) - z_label

    p_(1) >= ... >= p_(n) are the row's weights above 0, q_(i) the student's largest of the columns `among`, p_T and q_T
    what is left of each. It is at most what the whole sorted distributions give, sum_i |p_(i) - q_(i)|, whose terms
    beyond n it adds up before it takes the absolute value; and 0 for a student whose sorted probabilities are the
    teacher's. Columns that are not among them are in the softmax and in q_T. Where the teacher kept more tokens than
    the student has, the least of them are in p_T.

    The order is a constant of the gradient, which is by hand that of twice the total variation at these columns
    (`bucket_loss_ce` of `TVD`): exact wherever no two of the student's are equal; where one is the teacher's its slope
    is taken as 0.

    Rows are (weights [N, k] float32, log_tail_mass [N] float32, labels [N] int32): the teacher's ids are not read.

    Attributes:
        among: bool [V]; the student's tokens. Padding of its head is none.
        count: how many they are.
        temperature: T > 0.

    Reference: Boizard et al., "Towards Cross-Tokenizer Distillation: the Universal Logit Distillation Loss for LLMs",
    2024, which has no cell for the rest and no T.
    """

    names: ClassVar = ("weights", "log_tail_mass", "labels")

    among: mx.array
    count: int
    temperature: float = 1.0

    def forward(self, logits: mx.array, *rows: mx.array) -> tuple[Arrays, Arrays]:
        """See `RowLoss.forward`: (kd, ce)."""
        ids = largest(logits, self.among, min(self.count, rows[0].shape[1]))
        (kd, ce), saved = self._bucket.forward(logits, ids, *self._sorted(rows))
        return (2 * kd, ce), (ids, *saved)

    def backward(self, logits: mx.array, *rows: mx.array, saved: Arrays, cotangents: Arrays) -> mx.array:
        """See `RowLoss.backward`."""
        ids, *own = saved
        ct_kd, ct_ce = cotangents
        return self._bucket.backward(logits, ids, *self._sorted(rows), saved=tuple(own), cotangents=(2 * ct_kd, ct_ce))

    @property
    def _bucket(self) -> RowLoss:
        return on_tier(BucketLoss(self.temperature, divergence=TVD()))

    def _sorted(self, rows: Arrays) -> Arrays:
        """Return the rows with the weights in order, of which no more are left than the student has tokens."""
        weights, log_tail, labels = rows
        weights = -mx.sort(-weights.astype(mx.float32), axis=-1)
        if weights.shape[1] > self.count:
            beyond = weights[:, self.count :].sum(axis=-1)
            weights, log_tail = weights[:, : self.count], mx.log(mx.exp(log_tail.astype(mx.float32)) + beyond)
        return weights, log_tail, labels
