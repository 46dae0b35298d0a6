"""KL divergence to a sparse teacher and cross-entropy to the label, from one reading of the student's logits.

This is the linear loss of unbiased selections (a sample whose weights stand for the whole distribution) and of a full
teacher (k = V). For a truncated teacher, whose weights stand only for themselves, see `bucket_kl`.
"""

from distill_kernels.row_loss import (
    Arrays,
    TemperedLoss,
    add_at_ids,
    at_ids,
    check_rows,
    counted,
    cross_entropy,
    in_vocabulary,
    log_sum_exp,
)

import mlx.core as mx


class SparseKL(TemperedLoss):
    """`sparse_kl_ce` at one temperature, as a `RowLoss` over rows (ids, weights, labels)."""

    def forward(self, logits: mx.array, *rows: mx.array) -> tuple[Arrays, Arrays]:
        ids, weights, labels = rows
        check_rows(logits, (ids, weights), {"labels": labels})
        t = self.temperature
        z = logits.astype(mx.float32)
        lse = log_sum_exp(z)
        lse_t = lse if t == 1 else log_sum_exp(z / t)
        ids, w = counted(ids, weights, logits.shape[1])
        log_ratio = mx.log(w) - at_ids(logits, ids) / t + lse_t[:, None]
        kl = t * t * mx.where(w > 0, w * log_ratio, 0).sum(axis=-1)
        return (kl, cross_entropy(logits, labels, lse)), (lse, lse_t)

    def backward(self, logits: mx.array, *rows: mx.array, saved: Arrays, cotangents: Arrays) -> mx.array:
        ids, weights, labels = rows
        t = self.temperature
        (lse, lse_t), (ct_kl, ct_ce) = saved, cotangents
        ids, w = counted(ids, weights, logits.shape[1])
        labelled, labels = in_vocabulary(labels, logits.shape[1])
        a, b = t * ct_kl, ct_ce * labelled
        total = a * w.sum(axis=-1)
        z = logits.astype(mx.float32)
        if t == 1:
            dz = (total + b)[:, None] * mx.exp(z - lse[:, None])
        else:
            dz = total[:, None] * mx.exp(z / t - lse_t[:, None]) + b[:, None] * mx.exp(z - lse[:, None])
        columns = mx.concatenate([ids, labels[:, None].astype(ids.dtype)], axis=-1)
        dz = add_at_ids(dz, columns, -mx.concatenate([a[:, None] * w, b[:, None]], axis=-1))
        return dz.astype(logits.dtype)


def sparse_kl_ce_ops(
    logits: mx.array, ids: mx.array, weights: mx.array, labels: mx.array, temperature: float = 1.0
) -> tuple[mx.array, mx.array]:
    """Return (kl, ce), each [N] float32, of the student's logits, in plain MLX operations.

        kl = T² · sum_i w_i · log(w_i / q_i),   q = softmax(z / T),  0 · log 0 = 0
        ce = LSE(z) - z_label

    The weights are taken as they are and never assumed to sum to 1: the part of kl that depends on the student is
    (sum w) · LSE(z / T) - sum_i w_i z_i / T. An entry counts when its weight is above 0 and its id in [0, V): others
    are padding, or tokens that the student lacks, and their mass is in neither value nor gradient. Likewise a label
    outside [0, V) gives ce = 0. A -inf logit is harmless while no weight is on it; then kl is inf.

    Gradient, by hand, one pass from two saved log-normalisers per row, in the logits' dtype:

        dz = ct_kl · T · ((sum w) · softmax(z / T) - scatter(w)) + ct_ce · (softmax(z) - onehot(label))

    Args:
        logits: z, [N, V], any float dtype; the arithmetic is float32.
        ids: [N, k], uint32 or int32; may repeat.
        weights: w, [N, k] float32; constants, like the ids.
        labels: [N] int32.
        temperature: T > 0.

    Raises:
        ValueError: the shapes do not fit, or the temperature is not above 0.

    Reference: Hinton et al. 2015, section 2 (T²); Anshumann et al. 2025, Sparse Logit Sampling (sampled weights).
    """
    kl, ce = SparseKL(temperature)(logits, ids, weights, labels)
    return kl, ce


sparse_kl_ce = sparse_kl_ce_ops
