"""Spans of two tokenizers brought together at their last token: by name where both have it, sorted where they do not.

A teacher's entry of a row is named by an id of the student's, below V, or has no name: then its id is V + r, where r is
its rank among the row's entries without one, 0 for the likeliest. Tokens of the student that are none of the teacher's
are the columns `unnamed`, and the r-th likeliest of those is what entry V + r is held against.

Two steps, as a span's loss needs more than one row of logits: `LogCells` takes from a chunk of logits what the loss
sees of them, k + 1 numbers per row, and `gold_divergence` is the loss of those.
"""

from dataclasses import dataclass

from distill_kernels.bucket import log_student_cells
from distill_kernels.divergence import JSD
from distill_kernels.row_loss import Arrays, RowLoss
from distill_kernels.row_ops import add_at_ids, at_ids, cross_entropy, in_vocabulary, log_sum_exp
from distill_kernels.sorted_l1 import largest

import mlx.core as mx

LEAST = -87.0
"""A cell's least log-probability: e^-87 is about the least normal float32, and no gradient is felt below it."""


@dataclass(frozen=True, eq=False)
class LogCells(RowLoss):
    """The student's log-probs (log_q [N, k], log_q_rest [N], ce [N]) of rows (ids [N, k], weights [N, k], labels [N]).

        log_q = log softmax(z / T) at the entries' columns, log_q_rest = log sum of softmax(z / T) elsewhere
        ce = LSE(z) - z_label

    An entry of weight 0, or of a rank that the student has no token for, has no column and log_q -inf. Columns of a row
    are distinct. Gradient by hand, with s the sum of ct_log_q and ct_rest and w = exp(z / T - LSE elsewhere):

        dz_j = (ct_log_q_j or ct_rest w_j) / T - s softmax(z / T)_j / T + ct_ce (softmax(z) - onehot(label))_j

    Attributes:
        unnamed: bool [V]; the student's tokens that are none of the teacher's.
        count: how many they are.
        temperature: T > 0.
    """

    unnamed: mx.array
    count: int
    temperature: float = 1.0

    def forward(self, logits: mx.array, *rows: mx.array) -> tuple[Arrays, Arrays]:
        """See `RowLoss.forward`."""
        ids, weights, labels = rows
        z = logits.astype(mx.float32)
        there, columns = self._columns(z, ids, weights)
        lse_kept = mx.logsumexp(mx.where(there, at_ids(z, columns) / self.temperature, -mx.inf), axis=-1)
        lse_rest = log_sum_exp(self._rest(z, there, columns))
        lse = log_sum_exp(z)
        log_q, log_q_rest = log_student_cells(at_ids(z, columns) / self.temperature, lse_kept, lse_rest)
        ce = cross_entropy(z, labels, lse)
        return (mx.where(there, log_q, -mx.inf), log_q_rest, ce), (lse, lse_kept, lse_rest, there, columns)

    def backward(self, logits: mx.array, *rows: mx.array, saved: Arrays, cotangents: Arrays) -> mx.array:
        """See `RowLoss.backward`."""
        lse, lse_kept, lse_rest, there, columns = saved
        ct_log_q, ct_rest, ct_ce = cotangents
        z = logits.astype(mx.float32)
        labelled, labels = in_vocabulary(rows[2], z.shape[1])
        ct_log_q, ct_ce = mx.where(there, ct_log_q, 0) / self.temperature, mx.where(labelled, ct_ce, 0)[:, None]
        ct_rest = ct_rest / self.temperature
        total = ct_log_q.sum(axis=-1) + ct_rest
        within = mx.exp(self._rest(z, there, columns) - mx.where(lse_rest == -mx.inf, 0, lse_rest)[:, None])
        q = mx.exp(z / self.temperature - mx.logaddexp(lse_kept, lse_rest)[:, None])
        dz = ct_rest[:, None] * within - total[:, None] * q + ct_ce * mx.exp(z - lse[:, None])
        at = mx.concatenate([columns, labels[:, None].astype(columns.dtype)], axis=-1)
        return add_at_ids(dz, at, mx.concatenate([ct_log_q, -ct_ce], axis=-1)).astype(logits.dtype)

    def _columns(self, z: mx.array, ids: mx.array, weights: mx.array) -> tuple[mx.array, mx.array]:
        """Return (which entries have a column, the columns): [N, k] each; a column is safe to read in any case."""
        named, columns = in_vocabulary(ids, z.shape[1])
        there = weights > 0
        n = min(self.count, ids.shape[1])
        if not n:
            return there & named, columns
        ranked, ranks = in_vocabulary(ids.astype(mx.int64) - z.shape[1], n)
        by_rank = mx.take_along_axis(largest(z, self.unnamed, n), ranks, axis=-1)
        return there & (named | ranked), mx.where(named, columns, mx.where(ranked, by_rank, 0)).astype(mx.uint32)

    def _rest(self, z: mx.array, there: mx.array, columns: mx.array) -> mx.array:
        """Return z / T with -inf at the columns."""
        return add_at_ids(z, columns, mx.where(there, -mx.inf, 0)) / self.temperature


def gold_divergence(
    weights: mx.array,
    named: mx.array,
    log_tail_mass: mx.array,
    log_before: mx.array,
    log_q: mx.array,
    log_q_rest: mx.array,
    student_log_before: mx.array,
    temperature: float = 1.0,
) -> mx.array:
    """Return how far the two sides' distributions over what ends S spans are apart, [S] float32, at least 0.

        P = exp(log_before) · p,   Q = exp(student_log_before) · q             the chain rule: the span up to its last
                                                                               token, and that token
        w = sum_named p / sum p
        f(P, Q) = (P log(2 P / (P + Q)) + Q log(2 Q / (P + Q))) / 2
        kd = T² · (w · (sum_named f(P_i, Q_i) + f(P_else, Q_else))
                   + (1 - w) · (sum_unnamed |P_(r) - Q_(r)| + |P_T - Q_T|))

    p and q are at temperature T; what comes before the last token is at temperature 1, which is what a store keeps of
    labels. P_else is all that has no name, in entries or in the tail, Q_else what the student has outside the named
    entries; P_T is the tail and Q_T what the student has at no entry. So where every token has a name, and spans one
    token, kd is `bucket_loss_ce` of `JSD(0.5)`.

    f is at least 0 in every cell and 0 where P = Q, although neither side sums to 1: by the log-sum inequality, or as
    the Jensen-Shannon divergence of the extended KL of measures, P log(P / M) + M - P, whose last terms cancel for M =
    (P + Q) / 2. A student that has given the span up (Q near 0) feels little of it: a gradient has the size of Q.

    Args:
        weights: [S, k] float32; p of the entries, 0 where there is none. Constants, like all of the teacher's.
        named: bool [S, k]; entries with a name.
        log_tail_mass: [S] float32; log of the mass that is in no entry.
        log_before: [S] float32; the sum of the teacher's log-probs of a span's tokens but the last, 0 for one token.
        log_q: [S, k]; from `LogCells`.
        log_q_rest: [S]; from there.
        student_log_before: [S]; the same sum of the student's.
        temperature: T of p and q.

    Reference: Patiño et al., "Unlocking On-Policy Distillation for Any Model Family" (GOLD), 2025, and TRL's
    `GOLDTrainer`, which weighs by counts of tokens and has no cells for the rest; f: Lin, "Divergence Measures Based on
    the Shannon Entropy", 1991, for measures Nielsen, "On the Jensen-Shannon Symmetrization of Distances Relying on
    Abstract Means", 2019.
    """
    there = weights > 0
    p = mx.where(there, weights.astype(mx.float32), 0)
    named = named & there
    unnamed = there & ~named
    before, own_before = mx.exp(log_before)[:, None], mx.exp(student_log_before)[:, None]
    q = mx.exp(mx.maximum(log_q, LEAST))
    kept = p.sum(axis=-1)
    named_share = mx.where(kept > 0, mx.where(named, p, 0).sum(axis=-1) / mx.where(kept > 0, kept, 1), 1)
    p_tail, q_rest = mx.exp(log_tail_mass), mx.exp(mx.maximum(log_q_rest, LEAST))
    p_else = mx.where(unnamed, p, 0).sum(axis=-1) + p_tail
    q_else = mx.where(unnamed, q, 0).sum(axis=-1) + q_rest

    jsd = mx.where(named, _jsd(_log(p) + log_before[:, None], log_q + student_log_before[:, None]), 0).sum(axis=-1)
    jsd = jsd + _jsd(_log(p_else) + log_before, _log(q_else) + student_log_before)
    l1 = mx.where(unnamed, mx.abs(before * p - own_before * q), 0).sum(axis=-1)
    l1 = l1 + mx.abs(before[:, 0] * p_tail - own_before[:, 0] * q_rest)
    return temperature * temperature * (named_share * jsd + (1 - named_share) * l1)


def _log(x: mx.array) -> mx.array:
    """log x of x at least 0, no less than `LEAST`."""
    return mx.log(mx.maximum(x, mx.exp(mx.array(LEAST))))


def _jsd(log_p: mx.array, log_q: mx.array) -> mx.array:
    """f, of logarithms that may be -inf."""
    log_p, log_q = mx.maximum(log_p, LEAST), mx.maximum(log_q, LEAST)
    return JSD().value(mx.exp(log_p), log_p, mx.exp(log_q), log_q)
