"""Divergences that are not linear in the teacher, from an unbiased sample whose entries know their own probability.

A sum over the vocabulary of any f(p_v, q_v) is estimated without bias by the sampled entries' f, each divided by the
probability with which it was drawn (Horvitz and Thompson, 1952). A weight is p divided by that probability, so its
inverse is weight / p. For `threshold:k` stores built with `--tail-log-probs`.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar, Unpack

from distill_kernels.divergence import Divergence, ForwardKL
from distill_kernels.logits_loss import LogitsLoss, LogitsOptions
from distill_kernels.row_loss import Arrays
from distill_kernels.row_ops import at_ids, check_sparse, counted, cross_entropy, normalisers, softmax_and_ids
from distill_kernels.tier import Tier, kd_and_ce

import mlx.core as mx


@dataclass(frozen=True)
class SampledLoss(LogitsLoss):
    """`sampled_loss_ce` as a `RowLoss` over rows (ids, weights, log_probs, labels[, row_weights])."""

    names: ClassVar = ("ids", "weights", "log_probs", "labels")

    divergence: Divergence = field(default=ForwardKL(), kw_only=True)

    def value(self, z: mx.array, *targets: mx.array) -> tuple[Arrays, Arrays]:
        ids, weights, log_p, labels = targets
        check_sparse(z, ids, weights, log_p, labels=labels)
        t = self.temperature
        lse, lse_t = normalisers(z, t)
        ids, w = counted(ids, weights, z.shape[1])
        cells, inverse = self._cells(z, ids, w, log_p, lse_t)
        kd = t * t * mx.where(w > 0, inverse * self.divergence.value(*cells), 0).sum(axis=-1)
        return (kd, cross_entropy(z, labels, lse)), (lse, lse_t)

    def slope(self, z: mx.array, *targets: mx.array, saved: Arrays, cotangents: Arrays) -> mx.array:
        ids, weights, log_p, labels = targets
        ct_kd, ct_ce = cotangents
        ids, w = counted(ids, weights, z.shape[1])
        cells, inverse = self._cells(z, ids, w, log_p, saved[1])
        h = mx.where(w > 0, inverse * self.divergence.slope(*cells), 0)
        a = self.temperature * ct_kd
        return softmax_and_ids(z, self.temperature, saved, -a * h.sum(axis=-1), ids, a[:, None] * h, labels, ct_ce)

    def _cells(
        self, z: mx.array, ids: mx.array, w: mx.array, log_p: mx.array, lse_t: mx.array
    ) -> tuple[tuple[mx.array, mx.array, mx.array, mx.array], mx.array]:
        """Return (p, log p, q, log q) of the entries, and weight / p, [N, k] each."""
        log_p = log_p.astype(mx.float32)
        log_q = at_ids(z, ids) / self.temperature - lse_t[:, None]
        return (mx.exp(log_p), log_p, mx.exp(log_q), log_q), mx.exp(mx.log(w) - log_p)


def sampled_loss_ce(
    logits: mx.array,
    ids: mx.array,
    weights: mx.array,
    log_probs: mx.array,
    labels: mx.array,
    divergence: Divergence,
    temperature: float = 1.0,
    row_weights: mx.array | None = None,
    tier: Tier | None = None,
    **options: Unpack[LogitsOptions],
) -> tuple[mx.array, mx.array]:
    """Return (kd, ce), each [N] float32, of the student's logits.

        kd = T² · sum_i w_i / p_i · f(p_i, q_i),   q = softmax(z / T);   its mean over samples is T² · sum_v f(p_v, q_v)

    A single value may be negative where the divergence is not; `ForwardKL` gives the KL itself, where
    `sparse_kl_ce` has a constant too much. Tokens with p = 0 are never drawn, so what they add is missing: infinity for
    a reverse KL, q / 2 for a TVD. Where the student is likely and the teacher is not, w / p is large and so is the
    variance. Entries, labels and ce are as in `sparse_kl_ce`.

    Gradient, by hand, from two saved floats per row, with h = q · df/dq up to a multiple of q, whose part in the
    gradient has mean 0 and would be noise:

        dz = ct_kd · T · (scatter(w / p · h) - (sum_i w_i / p_i · h_i) · q)  +  ct_ce · (softmax(z) - onehot(label))

    Args:
        logits: [N, V], any float dtype; the arithmetic is float32. z is made of them by the options.
        ids: [N, k], uint32 or int32.
        weights: w, [N, k] float32; an entry counts where it is above 0.
        log_probs: log p of the entries at temperature T, [N, k] float32.
        labels: [N] int32.
        divergence: one of `divergence`'s.
        temperature: T > 0.
        row_weights: [N], a factor of each row's losses; a row of weight 0 touches nothing, even when it holds NaN.
        tier: "ops", "metal", or the one that runs here: see `tier.on_tier`.
        options: scale, softcap, vocab_size: see `LogitsLoss`.

    Raises:
        ValueError: the shapes do not fit, or an option is not above 0.

    Reference: Horvitz and Thompson 1952, A generalization of sampling without replacement from a finite universe.
    """
    return kd_and_ce(
        SampledLoss(temperature, **options, divergence=divergence),
        tier,
        logits,
        ids,
        weights,
        log_probs,
        labels,
        row_weights=row_weights,
    )


sampled_loss_ce_ops, sampled_loss_ce_kernel = (
    partial(sampled_loss_ce, tier="ops"),
    partial(sampled_loss_ce, tier="metal"),
)
