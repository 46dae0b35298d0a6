"""KL divergence to a truncated teacher: its k kept tokens plus one bucket for all the others; and cross-entropy.

For biased selections (top-k, top-p). The bucket makes the student pay for mass that leaks to unlisted tokens, and costs
an exact student nothing: renormalising inside the kept set does neither.
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


class BucketKL(TemperedLoss):
    """`bucket_kl_ce` at one temperature, as a `RowLoss` over rows (ids, weights, log_tail_mass, labels)."""

    def forward(self, logits: mx.array, *rows: mx.array) -> tuple[Arrays, Arrays]:
        ids, weights, log_tail, labels = rows
        check_rows(logits, (ids, weights), {"log_tail_mass": log_tail, "labels": labels})
        t = self.temperature
        ids, p = counted(ids, weights, logits.shape[1])
        s = at_ids(logits, ids) / t
        lse_rest = log_sum_exp(self._rest(logits, ids, p))
        lse_t = mx.logaddexp(lse_rest, mx.logsumexp(mx.where(p > 0, s, -mx.inf), axis=-1))
        lse = lse_t if t == 1 else log_sum_exp(logits.astype(mx.float32))
        log_tail = log_tail.astype(mx.float32)
        p_tail = mx.exp(log_tail)
        kept = mx.where(p > 0, p * (mx.log(p) - s + lse_t[:, None]), 0).sum(axis=-1)
        tail = mx.where(p_tail > 0, p_tail * (log_tail - lse_rest + lse_t), 0)
        return (t * t * (kept + tail), cross_entropy(logits, labels, lse)), (lse, lse_t, lse_rest)

    def backward(self, logits: mx.array, *rows: mx.array, saved: Arrays, cotangents: Arrays) -> mx.array:
        ids, weights, log_tail, labels = rows
        t = self.temperature
        (lse, lse_t, lse_rest), (ct_kl, ct_ce) = saved, cotangents
        ids, p = counted(ids, weights, logits.shape[1])
        labelled, labels = in_vocabulary(labels, logits.shape[1])
        p_tail, q_tail = mx.exp(log_tail.astype(mx.float32)), mx.exp(lse_rest - lse_t)
        mass = p.sum(axis=-1) + p_tail
        a, b = t * ct_kl, ct_ce * labelled

        # Within the tail, softmax over the tail: finite however little of the student's mass is there.
        finite = mx.where(lse_rest > -mx.inf, lse_rest, 0)[:, None]
        within = mx.exp(self._rest(logits, ids, p) - finite)
        q = mx.exp(at_ids(logits, ids) / t - lse_t[:, None])
        on_tail, on_kept = a * (mass * q_tail - p_tail), a[:, None] * (mass[:, None] * q - p)
        if t == 1:
            dz = (on_tail + b * q_tail)[:, None] * within
            on_kept = on_kept + b[:, None] * q
        else:
            dz = on_tail[:, None] * within + b[:, None] * mx.exp(logits.astype(mx.float32) - lse[:, None])
        columns = mx.concatenate([ids, labels[:, None].astype(ids.dtype)], axis=-1)
        dz = add_at_ids(dz, columns, mx.concatenate([mx.where(p > 0, on_kept, 0), -b[:, None]], axis=-1))
        return dz.astype(logits.dtype)

    def _rest(self, logits: mx.array, ids: mx.array, p: mx.array) -> mx.array:
        """Return logits / T in float32 with -inf at the kept ids; padding entries mask nothing."""
        z = add_at_ids(logits.astype(mx.float32), ids, mx.where(p > 0, -mx.inf, 0))
        return z if self.temperature == 1 else z / self.temperature


def bucket_kl_ce_ops(
    logits: mx.array,
    ids: mx.array,
    weights: mx.array,
    log_tail_mass: mx.array,
    labels: mx.array,
    temperature: float = 1.0,
) -> tuple[mx.array, mx.array]:
    """Return (kl, ce), each [N] float32, of the student's logits, in plain MLX operations.

        kl = T² · (sum_S p_i · log(p_i / q_i) + p_T · log(p_T / q_T)),   q = softmax(z / T),  q_T = sum of q outside S
        ce = LSE(z) - z_label

    S are the ids in [0, V) with a weight above 0, and distinct in their row; the rest is padding, or tokens that the
    student lacks: their mass is in neither value nor gradient. q_T is exp(LSE outside S - LSE), never 1 - sum: a tail
    of 1e-20 keeps all its digits. By the data-processing inequality kl is at most the divergence of the whole
    distributions, and it is 0 for an exact student. p_T = 0 (log -inf) and k = V are fine; p_T > 0 with no token
    outside S gives inf. Labels and -inf logits are as in `sparse_kl_ce_ops`.

    Gradient, by hand, from three saved floats per row, in the logits' dtype, with M = sum_S p + p_T:

        dz = ct_kl · T · (M q - p)               on S
           = ct_kl · T · q · (M - p_T / q_T)     off S,   plus  ct_ce · (softmax(z) - onehot(label))

    Args:
        logits: z, [N, V], any float dtype; the arithmetic is float32.
        ids: [N, k], uint32 or int32.
        weights: p on S at temperature T, [N, k] float32; constants, like the ids.
        log_tail_mass: log p_T, [N] float32.
        labels: [N] int32.
        temperature: T > 0.

    Raises:
        ValueError: the shapes do not fit, or the temperature is not above 0.
    """
    kl, ce = BucketKL(temperature)(logits, ids, weights, log_tail_mass, labels)
    return kl, ce


bucket_kl_ce = bucket_kl_ce_ops
