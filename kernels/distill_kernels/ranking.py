"""Losses on the order in which a teacher ranks its kept tokens, pair by pair; and cross-entropy in the same pass.

They say nothing of probabilities outside the kept set but what the normaliser does, so they go beside another loss.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar, Unpack

from distill_kernels.logits_loss import LogitsLoss, LogitsOptions
from distill_kernels.row_loss import Arrays
from distill_kernels.row_ops import at_ids, check_sparse, counted, cross_entropy, normalisers, softmax_and_ids
from distill_kernels.tier import Tier, kd_and_ce

import mlx.core as mx

TIE = 1e-6
"""Teacher probabilities no further apart than this are not ranked."""


@dataclass(frozen=True)
class RankLoss(LogitsLoss):
    """Mean over the ranked pairs of a row, and cross-entropy, over rows (ids, weights, labels[, row_weights])."""

    names: ClassVar = ("ids", "weights", "labels")

    def pairs(self, p: mx.array, s: mx.array, q: mx.array) -> tuple[mx.array, mx.array]:
        """Return (each pair's loss, and its slope by x_i - x_j), [N, k, k]; x is q or s as the loss says."""
        raise NotImplementedError

    def on_ids(self, u: mx.array, q: mx.array) -> tuple[mx.array, mx.array]:
        """Return (h, G) of dL/ds = scatter(h) - G · softmax, [N, k] and [N], from u = dL/dx."""
        raise NotImplementedError

    def value(self, z: mx.array, *targets: mx.array) -> tuple[Arrays, Arrays]:
        ids, weights, labels = targets
        check_sparse(z, ids, weights, labels=labels)
        t = self.temperature
        lse, lse_t = normalisers(z, t)
        ids, p = counted(ids, weights, z.shape[1])
        s = at_ids(z, ids) / t
        share = _shares(p)
        losses, _ = self.pairs(p, s, mx.exp(s - lse_t[:, None]))
        mean = mx.where(share > 0, share * losses, 0).sum(axis=(1, 2))
        return (mean, cross_entropy(z, labels, lse)), (lse, lse_t)

    def slope(self, z: mx.array, *targets: mx.array, saved: Arrays, cotangents: Arrays) -> mx.array:
        ids, weights, labels = targets
        ct_kd, ct_ce = cotangents
        t = self.temperature
        ids, p = counted(ids, weights, z.shape[1])
        s = at_ids(z, ids) / t
        q = mx.exp(s - saved[1][:, None])
        share = _shares(p)
        slopes = mx.where(share > 0, share * self.pairs(p, s, q)[1], 0)
        h, total = self.on_ids(slopes.sum(axis=2) - slopes.sum(axis=1), q)
        a = ct_kd / t
        return softmax_and_ids(z, t, saved, -a * total, ids, a[:, None] * h, labels, ct_ce)


@dataclass(frozen=True)
class HingeRank(RankLoss):
    """`hinge_rank_ce` as a `RowLoss`."""

    margin: float | None = field(default=None, kw_only=True)

    def pairs(self, p: mx.array, s: mx.array, q: mx.array) -> tuple[mx.array, mx.array]:
        del s
        short = (_differences(p) if self.margin is None else self.margin) - _differences(q)
        return mx.maximum(short, 0), mx.where(short > 0, -1.0, 0.0)

    def on_ids(self, u: mx.array, q: mx.array) -> tuple[mx.array, mx.array]:
        return q * u, (q * u).sum(axis=-1)


@dataclass(frozen=True)
class LogisticRank(RankLoss):
    """`logistic_rank_ce` as a `RowLoss`."""

    def pairs(self, p: mx.array, s: mx.array, q: mx.array) -> tuple[mx.array, mx.array]:
        del p, q
        apart = mx.where(s[:, :, None] == s[:, None, :], 0, _differences(s))  # two of -inf are a tie
        return mx.logaddexp(0.0, -apart), -mx.sigmoid(-apart)

    def on_ids(self, u: mx.array, q: mx.array) -> tuple[mx.array, mx.array]:
        return u, mx.zeros(len(q))


def _differences(x: mx.array) -> mx.array:
    """Return x_i - x_j, [N, k] -> [N, k, k]."""
    return x[:, :, None] - x[:, None, :]


def _shares(p: mx.array) -> mx.array:
    """Return 1 / (pairs of the row) where i is ranked above j, else 0, [N, k, k]; p = 0 is padding."""
    ranked = (_differences(p) > TIE) & (p > 0)[:, None, :]
    return ranked / mx.maximum(ranked.sum(axis=(1, 2), keepdims=True), 1)


def hinge_rank_ce(
    logits: mx.array,
    ids: mx.array,
    weights: mx.array,
    labels: mx.array,
    margin: float | None = None,
    temperature: float = 1.0,
    row_weights: mx.array | None = None,
    tier: Tier | None = None,
    **options: Unpack[LogitsOptions],
) -> tuple[mx.array, mx.array]:
    """Return (hinge, ce), each [N] float32, of the student's logits.

        hinge = mean over the pairs with p_i > p_j + 1e-6 of relu(g_ij - (q_i - q_j)),   q = softmax(z / T)

    over the whole vocabulary, and g_ij = margin, or p_i - p_j without one. 0 for a row with no pair. Unlike the
    divergences it has no factor T²: it is in the probabilities' own units, as the margin is. Entries, labels, ce and
    the other arguments are as in `sparse_kl_ce`; p are the weights at temperature T. Memory is [N, k, k].

    Gradient, by hand, from two saved floats per row, in the logits' dtype; c_ij = 1 / pairs where the pair's hinge is
    open (> 0), else 0:

        u_i = sum_j c_ji - c_ij,    dz = ct / T · q · (scatter(u) - sum_i u_i q_i)

    Raises:
        ValueError: the shapes do not fit, or an option is not above 0.

    Reference: arcee-ai/DistillKit, `hinge`.
    """
    return kd_and_ce(
        HingeRank(temperature, **options, margin=margin), tier, logits, ids, weights, labels, row_weights=row_weights
    )


def logistic_rank_ce(
    logits: mx.array,
    ids: mx.array,
    weights: mx.array,
    labels: mx.array,
    temperature: float = 1.0,
    row_weights: mx.array | None = None,
    tier: Tier | None = None,
    **options: Unpack[LogitsOptions],
) -> tuple[mx.array, mx.array]:
    """Return (logistic, ce), each [N] float32, of the student's logits.

        logistic = mean over the pairs with p_i > p_j + 1e-6 of log(1 + exp(-(s_i - s_j))),   s = z / T

    0 for a row with no pair; two logits of -inf are a tie, log 2. The normaliser does not enter, and there is no factor
    T². All else is as in `hinge_rank_ce`.

    Gradient, by hand; c_ij = sigmoid(s_j - s_i) / pairs:

        dz = ct / T · scatter(u),   u_i = sum_j c_ji - c_ij

    Reference: Burges et al. 2005 (RankNet); arcee-ai/DistillKit, `logistic_ranking`.
    """
    return kd_and_ce(LogisticRank(temperature, **options), tier, logits, ids, weights, labels, row_weights=row_weights)


hinge_rank_ce_ops, hinge_rank_ce_kernel = partial(hinge_rank_ce, tier="ops"), partial(hinge_rank_ce, tier="metal")
logistic_rank_ce_ops, logistic_rank_ce_kernel = (
    partial(logistic_rank_ce, tier="ops"),
    partial(logistic_rank_ce, tier="metal"),
)
