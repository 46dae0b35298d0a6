"""Divergences from a truncated teacher: its k kept tokens plus one bucket for all the others; and cross-entropy.

For biased selections (top-k, top-p). The bucket makes the student pay for mass that leaks to unlisted tokens, and costs
an exact student nothing: renormalising inside the kept set does neither.
"""

import math
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar, Unpack

from distill_kernels.divergence import Divergence, ForwardKL, ReverseKL
from distill_kernels.logits_loss import LogitsLoss, LogitsOptions
from distill_kernels.row_loss import Arrays, RowLoss
from distill_kernels.row_ops import add_at_ids, at_ids, check_sparse, counted, cross_entropy, in_vocabulary, log_sum_exp
from distill_kernels.tier import Tier, kd_and_ce, on_tier

import mlx.core as mx

Cells = tuple[mx.array, mx.array, mx.array, mx.array]


@dataclass(frozen=True)
class BucketLoss(LogitsLoss):
    """`bucket_loss_ce` as a `RowLoss` over rows (ids, weights, log_tail_mass, labels[, row_weights])."""

    names: ClassVar = ("ids", "weights", "log_tail_mass", "labels")

    divergence: Divergence = field(default=ForwardKL(), kw_only=True)

    def value(self, z: mx.array, *targets: mx.array) -> tuple[Arrays, Arrays]:
        ids, weights, log_tail, labels = targets
        check_sparse(z, ids, weights, log_tail_mass=log_tail, labels=labels)
        t = self.temperature
        ids, p = counted(ids, weights, z.shape[1])
        lse_rest = log_sum_exp(self._rest(z, ids, p))
        lse_kept = mx.logsumexp(mx.where(p > 0, at_ids(z, ids) / t, -mx.inf), axis=-1)
        lse = mx.logaddexp(lse_kept, lse_rest) if t == 1 else log_sum_exp(z)
        kept, tail = self._cells(z, ids, p, log_tail, lse_kept, lse_rest)
        kd = mx.where(p > 0, self.divergence.value(*kept), 0).sum(axis=-1) + self.divergence.value(*tail)
        return (t * t * kd, cross_entropy(z, labels, lse)), (lse, lse_kept, lse_rest)

    def slope(self, z: mx.array, *targets: mx.array, saved: Arrays, cotangents: Arrays) -> mx.array:
        ids, weights, log_tail, labels = targets
        t = self.temperature
        (lse, lse_kept, lse_rest), (ct_kd, ct_ce) = saved, cotangents
        ids, p = counted(ids, weights, z.shape[1])
        labelled, labels = in_vocabulary(labels, z.shape[1])
        a, b = t * ct_kd, ct_ce * labelled

        kept, tail = self._cells(z, ids, p, log_tail, lse_kept, lse_rest)
        q, q_tail = kept[2], tail[2]
        h = mx.where(p > 0, self.divergence.slope(*kept), 0)
        h_tail = self.divergence.slope(*tail)
        total = h.sum(axis=-1) + h_tail
        # A row whose divergence nobody asks for may have an infinite one.
        on_tail = mx.where(a != 0, a * (h_tail - q_tail * total), 0)
        on_kept = mx.where(a[:, None] != 0, a[:, None] * (h - q * total[:, None]), 0)

        # Within the tail, softmax over the tail: finite however little of the student's mass is there.
        within = mx.exp(self._rest(z, ids, p) - _finite(lse_rest)[:, None])
        if t == 1:
            dz = (on_tail + b * q_tail)[:, None] * within
            on_kept = on_kept + b[:, None] * q
        else:
            dz = on_tail[:, None] * within + b[:, None] * mx.exp(z - lse[:, None])
        columns = mx.concatenate([ids, labels[:, None].astype(ids.dtype)], axis=-1)
        return add_at_ids(dz, columns, mx.concatenate([mx.where(p > 0, on_kept, 0), -b[:, None]], axis=-1))

    def _cells(
        self, z: mx.array, ids: mx.array, p: mx.array, log_tail: mx.array, lse_kept: mx.array, lse_rest: mx.array
    ) -> tuple[Cells, Cells]:
        """Return (p, log p, q, log q) of the kept cells, [N, k] each, and of the tail, [N] each."""
        log_q, log_q_tail = log_student_cells(at_ids(z, ids) / self.temperature, lse_kept, lse_rest)
        log_tail = log_tail.astype(mx.float32)
        return (p, mx.log(p), mx.exp(log_q), log_q), (mx.exp(log_tail), log_tail, mx.exp(log_q_tail), log_q_tail)

    def _rest(self, z: mx.array, ids: mx.array, p: mx.array) -> mx.array:
        """Return z / T with -inf at the kept ids; padding entries mask nothing."""
        z = add_at_ids(z, ids, mx.where(p > 0, -mx.inf, 0))
        return z if self.temperature == 1 else z / self.temperature


def log_student_cells(kept: mx.array, lse_kept: mx.array, lse_rest: mx.array) -> tuple[mx.array, mx.array]:
    """Return log q of the kept cells [N, k] and of the tail [N], of z / T on S and the LSEs of z / T on and off it.

    From the two parts' normalisers rather than the whole's: an LSE of 11 is rounded by 5e-7, which p_T would feel.
    """
    log_q_kept, log_q_tail = -mx.logaddexp(0.0, lse_rest - lse_kept), -mx.logaddexp(0.0, lse_kept - lse_rest)
    return kept - _finite(lse_kept)[:, None] + log_q_kept[:, None], log_q_tail


def _finite(lse: mx.array) -> mx.array:
    """Return lse, or 0 where it is -inf: no term is left that could be subtracted from."""
    return mx.where(lse == -mx.inf, 0, lse)


@dataclass(frozen=True)
class BucketKL(BucketLoss):
    """`bucket_kl_ce` as a `RowLoss`: the forward KL, whatever else is set."""

    divergence: Divergence = field(default=ForwardKL(), init=False, repr=False)


@dataclass(frozen=True)
class FlooredReverseKL(BucketLoss):
    """`BucketLoss` of the reverse KL to a tail of max(p_T, least), over the same rows.

    For targets that round a small tail to none: with p_T = 0 the reverse KL is infinite wherever the student gives the
    tail anything, though its teacher excludes nothing.

    Attributes:
        least: above 0; the least probability of a tail that the targets know.
    """

    divergence: Divergence = field(default=ReverseKL(), init=False, repr=False)
    least: float = field(kw_only=True)

    def forward(self, logits: mx.array, *rows: mx.array) -> tuple[Arrays, Arrays]:
        """See `RowLoss.forward`: saved is what the bucket loss saves on its tier."""
        return self._bucket.forward(logits, *self._floored(rows))

    def backward(self, logits: mx.array, *rows: mx.array, saved: Arrays, cotangents: Arrays) -> mx.array:
        """See `RowLoss.backward`."""
        return self._bucket.backward(logits, *self._floored(rows), saved=saved, cotangents=cotangents)

    @property
    def _bucket(self) -> RowLoss:
        options = self.temperature, self.scale, self.softcap, self.vocab_size
        return on_tier(BucketLoss(*options, divergence=self.divergence))

    def _floored(self, rows: Arrays) -> Arrays:
        ids, weights, log_tail, *others = rows
        return (ids, weights, mx.maximum(log_tail.astype(mx.float32), math.log(self.least)), *others)


def bucket_loss_ce(
    logits: mx.array,
    ids: mx.array,
    weights: mx.array,
    log_tail_mass: mx.array,
    labels: mx.array,
    divergence: Divergence,
    temperature: float = 1.0,
    row_weights: mx.array | None = None,
    tier: Tier | None = None,
    **options: Unpack[LogitsOptions],
) -> tuple[mx.array, mx.array]:
    """Return (kd, ce), each [N] float32, of the student's logits.

        kd = T² · (sum_S f(p_i, q_i) + f(p_T, q_T)),   q = softmax(z / T),  q_T = sum of q outside S
        ce = LSE(z) - z_label

    f is the divergence's value of a cell; for `ForwardKL` p log(p / q). S are the ids in [0, V) with a weight above 0,
    and distinct in their row; the rest is padding, or tokens that the student lacks: their mass is in neither value nor
    gradient. q_T is exp(LSE outside S - LSE), never 1 - sum: a tail of 1e-20 keeps all its digits. By the
    data-processing inequality kd is at most the divergence of the whole distributions, and it is 0 for an exact
    student. p_T = 0 (log -inf), k = V and rows with no entry (then everything is tail) are fine. Infinite, because the
    truth is: a forward KL with p > 0 where q = 0, also p_T > 0 with no token outside S; a reverse KL with p_T = 0 while
    q_T > 0, and its gradient is then not finite: skew it. Labels and -inf logits are as in `sparse_kl_ce`.

    Gradient, by hand, in the logits' dtype, from three floats saved per row: LSE(z), those of z / T on S and off it.
    With h = q · df/dq (for `ForwardKL` -p) and G the sum of h over S and the tail:

        dz = ct_kd · T · (h - q G)                                   on S
           = ct_kd · T · exp(z / T - LSE off S) · (h_T - q_T G)      off S
           + ct_ce · (softmax(z) - onehot(label))

    Args:
        logits: [N, V], any float dtype; the arithmetic is float32. z is made of them by the options.
        ids: [N, k], uint32 or int32.
        weights: p on S at temperature T, [N, k] float32; constants, like the ids.
        log_tail_mass: log p_T, [N] float32.
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
        BucketLoss(temperature, **options, divergence=divergence),
        tier,
        logits,
        ids,
        weights,
        log_tail_mass,
        labels,
        row_weights=row_weights,
    )


def bucket_kl_ce(
    logits: mx.array,
    ids: mx.array,
    weights: mx.array,
    log_tail_mass: mx.array,
    labels: mx.array,
    temperature: float = 1.0,
    row_weights: mx.array | None = None,
    tier: Tier | None = None,
    **options: Unpack[LogitsOptions],
) -> tuple[mx.array, mx.array]:
    """Return `bucket_loss_ce` of the forward KL."""
    return kd_and_ce(
        BucketKL(temperature, **options), tier, logits, ids, weights, log_tail_mass, labels, row_weights=row_weights
    )


bucket_loss_ce_ops, bucket_loss_ce_kernel = partial(bucket_loss_ce, tier="ops"), partial(bucket_loss_ce, tier="metal")
bucket_kl_ce_ops, bucket_kl_ce_kernel = partial(bucket_kl_ce, tier="ops"), partial(bucket_kl_ce, tier="metal")
