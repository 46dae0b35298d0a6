"""The linear losses on a sparse teacher, KL and soft cross-entropy, with cross-entropy to the label in the same pass.

They serve unbiased selections (a sample whose weights stand for the whole distribution) and a full teacher (k = V; as a
kernel up to 1,024 entries a row). For a truncated teacher, whose weights stand only for themselves, see `bucket`.
"""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Unpack

from distill_kernels.logits_loss import LogitsLoss, LogitsOptions
from distill_kernels.row_loss import Arrays
from distill_kernels.row_ops import at_ids, check_sparse, counted, cross_entropy, normalisers, softmax_and_ids
from distill_kernels.tier import Tier, kd_and_ce

import mlx.core as mx


@dataclass(frozen=True)
class SparseKL(LogitsLoss):
    """`sparse_kl_ce` as a `RowLoss` over rows (ids, weights, labels[, row_weights])."""

    names: ClassVar = ("ids", "weights", "labels")
    less_entropy: ClassVar[bool] = True

    def value(self, z: mx.array, *targets: mx.array) -> tuple[Arrays, Arrays]:
        ids, weights, labels = targets
        check_sparse(z, ids, weights, labels=labels)
        t = self.temperature
        lse, lse_t = normalisers(z, t)
        ids, w = counted(ids, weights, z.shape[1])
        cost = lse_t[:, None] - at_ids(z, ids) / t
        if self.less_entropy:
            cost = cost + mx.log(w)
        kd = t * t * mx.where(w > 0, w * cost, 0).sum(axis=-1)
        return (kd, cross_entropy(z, labels, lse)), (lse, lse_t)

    def slope(self, z: mx.array, *targets: mx.array, saved: Arrays, cotangents: Arrays) -> mx.array:
        ids, weights, labels = targets
        ct_kd, ct_ce = cotangents
        ids, w = counted(ids, weights, z.shape[1])
        a = self.temperature * ct_kd
        return softmax_and_ids(z, self.temperature, saved, a * w.sum(axis=-1), ids, -a[:, None] * w, labels, ct_ce)


class SoftCE(SparseKL):
    """`soft_ce` as a `RowLoss`: `SparseKL` without the teacher's entropy, so with the same gradient."""

    less_entropy: ClassVar[bool] = False


def sparse_kl_ce(
    logits: mx.array,
    ids: mx.array,
    weights: mx.array,
    labels: mx.array,
    temperature: float = 1.0,
    row_weights: mx.array | None = None,
    tier: Tier | None = None,
    **options: Unpack[LogitsOptions],
) -> tuple[mx.array, mx.array]:
    """Return (kl, ce), each [N] float32, of the student's logits.

        kl = T² · sum_i w_i · log(w_i / q_i),   q = softmax(z / T),  0 · log 0 = 0
        ce = LSE(z) - z_label

    The weights are taken as they are and never assumed to sum to 1: the part of kl that depends on the student is
    (sum w) · LSE(z / T) - sum_i w_i z_i / T. An entry counts when its weight is above 0 and its id in [0, V): others
    are padding, or tokens that the student lacks, and their mass is in neither value nor gradient. Likewise a label
    outside [0, V) gives ce = 0. A -inf logit is harmless while no weight is on it; then kl is inf.

    Gradient, by hand, one pass from two saved log-normalisers per row, in the logits' dtype:

        dz = ct_kl · T · ((sum w) · softmax(z / T) - scatter(w)) + ct_ce · (softmax(z) - onehot(label))

    Args:
        logits: [N, V], any float dtype; the arithmetic is float32. z is made of them by the options; without, it is
            them.
        ids: [N, k], uint32 or int32; may repeat.
        weights: w, [N, k] float32; constants, like the ids.
        labels: [N] int32.
        temperature: T > 0.
        row_weights: [N], a factor of each row's losses; a row of weight 0 touches nothing, even when it holds NaN.
        tier: "ops", "metal", or the one that runs here: see `tier.on_tier`.
        options: scale, softcap, vocab_size: see `LogitsLoss`.

    Raises:
        ValueError: the shapes do not fit, or an option is not above 0.

    Reference: Hinton et al. 2015, section 2 (T²); Anshumann et al. 2025, Sparse Logit Sampling (sampled weights).
    """
    return kd_and_ce(SparseKL(temperature, **options), tier, logits, ids, weights, labels, row_weights=row_weights)


def soft_ce(
    logits: mx.array,
    ids: mx.array,
    weights: mx.array,
    labels: mx.array,
    temperature: float = 1.0,
    row_weights: mx.array | None = None,
    tier: Tier | None = None,
    **options: Unpack[LogitsOptions],
) -> tuple[mx.array, mx.array]:
    """Return (soft, ce), each [N] float32: cross-entropy to the teacher's weights, and to the label.

        soft = -T² · sum_i w_i · log q_i = T² · ((sum w) · LSE(z / T) - sum_i w_i z_i / T)

    `sparse_kl_ce` plus T² times the teacher's entropy, a constant: gradient, arguments and errors are the same. It
    is linear in the weights, so its mean over draws of an unbiased sample is the whole teacher's value; that of the KL
    is not, for the sample's entropy is not the teacher's.
    """
    return kd_and_ce(SoftCE(temperature, **options), tier, logits, ids, weights, labels, row_weights=row_weights)


sparse_kl_ce_ops, sparse_kl_ce_kernel = partial(sparse_kl_ce, tier="ops"), partial(sparse_kl_ce, tier="metal")
soft_ce_ops, soft_ce_kernel = partial(soft_ce, tier="ops"), partial(soft_ce, tier="metal")
