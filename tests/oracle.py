"""The losses of `distill_kernels` in float64 NumPy, value and gradient as the formulas read, without short cuts.

A gradient goes the long way round: dD/dq of every cell, through the sum that makes a cell of tokens, through the whole
Jacobian of the softmax. `differences` of the values is the truth for these gradients in turn.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass
class Losses:
    """Two losses per row, [N] each, and their gradients by z, [N, V] each."""

    kd: Floats
    ce: Floats
    d_kd: Floats
    d_ce: Floats

    def gradient(self, ct_kd: Floats, ct_ce: Floats) -> Floats:
        """Return the gradient that the two cotangents ask for."""
        return ct_kd[:, None] * self.d_kd + ct_ce[:, None] * self.d_ce


def log_softmax(z: Floats) -> Floats:
    """Return log softmax of the last axis."""
    top = z.max(axis=-1, keepdims=True)
    return z - top - np.log(np.exp(z - top).sum(axis=-1, keepdims=True))


def through_softmax(dq: Floats, q: Floats) -> Floats:
    """Return dL/ds from dL/dq, q = softmax(s)."""
    return q * (dq - (q * dq).sum())


def cross_entropy(z: Floats, labels: Ints) -> tuple[Floats, Floats]:
    """Return -log softmax(z)[label] and its gradient; 0 where there is no such label."""
    ce, d_ce = np.zeros(len(z)), np.zeros_like(z)
    for n, label in enumerate(labels):
        if 0 <= label < z.shape[1]:
            log_q = log_softmax(z[n])
            ce[n], d_ce[n] = -log_q[label], np.exp(log_q)
            d_ce[n, label] -= 1
    return ce, d_ce


def kept(ids: Ints, weights: Floats, vocab: int) -> list[tuple[int, float]]:
    """Return the entries of a row that count."""
    return [(int(i), float(w)) for i, w in zip(ids, weights, strict=True) if w > 0 and 0 <= i < vocab]


def sparse(z: Floats, ids: Ints, weights: Floats, labels: Ints, t: float, less_entropy: bool = True) -> Losses:
    """Linear losses: T² sum w (log w - log q), or without log w."""
    kd, d_kd, log_q = np.zeros(len(z)), np.zeros_like(z), log_softmax(z / t)
    for n in range(len(z)):
        for i, w in kept(ids[n], weights[n], z.shape[1]):
            kd[n] += t * t * w * ((np.log(w) if less_entropy else 0) - log_q[n, i])
            d_kd[n] += t * t / t * w * (np.exp(log_q[n]) - (np.arange(z.shape[1]) == i))
    return Losses(kd, cross_entropy(z, labels)[0], d_kd, cross_entropy(z, labels)[1])


def divergence(kind: Any, p: Floats, q: Floats) -> tuple[Floats, Floats]:
    """Return (f, df/dq) of each cell; 0 log 0 = 0. `kind` is one of `distill_kernels.divergence`'s."""

    def mixed(weight: float) -> tuple[Floats, Floats, Floats, Floats]:
        m = weight * p + (1 - weight) * q
        return m, p * np.log(np.where(p > 0, p / m, 1)), q * np.log(np.where(q > 0, q / m, 1)), np.log(q / m)

    with np.errstate(divide="ignore", invalid="ignore"):
        match type(kind).__name__:
            case "ForwardKL":
                return np.where(p > 0, p * np.log(p / q), 0), np.where(p > 0, -p / q, 0)
            case "ReverseKL":
                return np.where(q > 0, q * np.log(q / p), 0), np.log(q / p) + 1
            case "JSD":
                b = kind.beta
                m, p_log, q_log, log_ratio = mixed(b)
                dm = 1 - b
                slope = -b * p * dm / m + (1 - b) * (log_ratio + 1 - q * dm / m)
                return b * p_log + (1 - b) * q_log, slope
            case "SkewKL":
                m, p_log, _, _ = mixed(kind.lam)
                return p_log, -p * (1 - kind.lam) / m
            case "SkewReverseKL":
                m, _, q_log, log_ratio = mixed(1 - kind.lam)
                return q_log, log_ratio + 1 - q * kind.lam / m
            case "TVD":
                return abs(p - q) / 2, np.sign(q - p) / 2
    raise ValueError(kind)


def members_of(ids: list[int], vocab: int) -> Floats:
    """Which tokens each cell holds, [k + 1, V] of 0 and 1: one each for the kept tokens, the last for all others."""
    members = np.zeros((len(ids) + 1, vocab))
    members[np.arange(len(ids)), ids] = 1
    members[-1] = 1 - members[:-1].sum(axis=0)
    return members


def bucket(kind: Any, z: Floats, ids: Ints, p: Floats, log_tail: Floats, labels: Ints, t: float) -> Losses:
    """T² times a divergence over the kept cells and one cell of all tokens that no entry with weight names."""
    kd, d_kd = np.zeros(len(z)), np.zeros_like(z)
    for n in range(len(z)):
        entries = kept(ids[n], p[n], z.shape[1])
        members = members_of([i for i, _ in entries], z.shape[1])
        q = np.exp(log_softmax(z[n] / t))
        f, df = divergence(kind, np.array([*(w for _, w in entries), np.exp(log_tail[n])]), members @ q)
        kd[n] = t * t * f.sum()
        df = np.where(members @ q > 0, df, 0)  # a cell that nobody is in
        d_kd[n] = t * t / t * through_softmax(members.T @ df, q)
    return Losses(kd, cross_entropy(z, labels)[0], d_kd, cross_entropy(z, labels)[1])


def taid(z: Floats, ids: Ints, p: Floats, log_tail: Floats, labels: Ints, t: float, at: float) -> Losses:
    """T² times the forward KL to p_t ~ q^(1 - at) p^at, a constant, over the same cells."""
    kd, d_kd = np.zeros(len(z)), np.zeros_like(z)
    for n in range(len(z)):
        entries = kept(ids[n], p[n], z.shape[1])
        members = members_of([i for i, _ in entries], z.shape[1])
        q = np.exp(log_softmax(z[n] / t))
        cells, teacher = members @ q, np.array([*(w for _, w in entries), np.exp(log_tail[n])])
        target = cells ** (1 - at) * teacher**at
        target /= target.sum()
        there = target > 0
        kd[n] = t * t * (target[there] * np.log(target[there] / cells[there])).sum()
        slope = np.where(there, -target / np.where(cells > 0, cells, 1), 0)
        d_kd[n] = t * through_softmax(members.T @ slope, q)
    return Losses(kd, cross_entropy(z, labels)[0], d_kd, cross_entropy(z, labels)[1])


def sampled(
    kind: Any, z: Floats, ids: Ints, w: Floats, log_p: Floats, labels: Ints, t: float, less_q: bool = False
) -> Losses:
    """T² sum w / p f(p, q), over the entries; or of f - q, which over samples is 1 less in the mean, whatever q is."""
    ce, d_ce = cross_entropy(z, labels)
    kd, d_kd = np.zeros(len(z)), np.zeros_like(z)
    for n in range(len(z)):
        q, dq = np.exp(log_softmax(z[n] / t)), np.zeros(z.shape[1])
        for i, weight in kept(ids[n], w[n], z.shape[1]):
            p = np.exp(log_p[n][list(ids[n]).index(i)])
            f, df = divergence(kind, np.array([p]), q[i : i + 1])
            kd[n] += t * t * weight / p * (f[0] - less_q * q[i])
            dq[i] += t * t * weight / p * (df[0] - less_q)
        d_kd[n] = through_softmax(dq, q) / t
    return Losses(kd, ce, d_kd, d_ce)


def dense(kind: Any, z: Floats, teacher: Floats, labels: Ints, t: float) -> Losses:
    """T² times a divergence of whole distributions."""
    kd, d_kd = np.zeros(len(z)), np.zeros_like(z)
    for n in range(len(z)):
        q = np.exp(log_softmax(z[n] / t))
        f, df = divergence(kind, np.exp(log_softmax(teacher[n] / t)), q)
        kd[n] = t * t * f.sum()
        d_kd[n] = t * t / t * through_softmax(np.where(q > 0, df, 0), q)
    return Losses(kd, cross_entropy(z, labels)[0], d_kd, cross_entropy(z, labels)[1])


def ranked(ids: Ints, p: Floats, vocab: int) -> Iterable[tuple[int, int, float]]:
    """Return (i, j, p_i - p_j) of the pairs of a row where the teacher puts token i above token j."""
    entries = kept(ids, p, vocab)
    return [(i, j, a - b) for i, a in entries for j, b in entries if a - b > 1e-6]


def hinge(z: Floats, ids: Ints, p: Floats, labels: Ints, t: float, margin: float | None = None) -> Losses:
    """Mean over pairs of relu(g - (q_i - q_j))."""
    kd, d_kd = np.zeros(len(z)), np.zeros_like(z)
    for n in range(len(z)):
        q, dq = np.exp(log_softmax(z[n] / t)), np.zeros(z.shape[1])
        pairs = list(ranked(ids[n], p[n], z.shape[1]))
        for i, j, gap in pairs:
            short = (gap if margin is None else margin) - (q[i] - q[j])
            if short > 0:
                kd[n] += short / len(pairs)
                dq[i] -= 1 / len(pairs)
                dq[j] += 1 / len(pairs)
        d_kd[n] = through_softmax(dq, q) / t
    return Losses(kd, cross_entropy(z, labels)[0], d_kd, cross_entropy(z, labels)[1])


def logistic(z: Floats, ids: Ints, p: Floats, labels: Ints, t: float) -> Losses:
    """Mean over pairs of log(1 + exp(-(s_i - s_j)))."""
    kd, d_kd = np.zeros(len(z)), np.zeros_like(z)
    for n in range(len(z)):
        pairs = list(ranked(ids[n], p[n], z.shape[1]))
        for i, j, _ in pairs:
            apart = (z[n, i] - z[n, j]) / t
            kd[n] += np.logaddexp(0, -apart) / len(pairs)
            d_kd[n, i] -= 1 / (1 + np.exp(apart)) / len(pairs) / t
            d_kd[n, j] += 1 / (1 + np.exp(apart)) / len(pairs) / t
    return Losses(kd, cross_entropy(z, labels)[0], d_kd, cross_entropy(z, labels)[1])


def of_raw(
    losses: Callable[[Floats], Losses],
    raw: Floats,
    scale: float = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
) -> Losses:
    """Return losses of z made from raw logits, with their gradients by the raw logits."""
    scaled = scale * raw[:, :vocab_size]
    z = scaled if softcap is None else softcap * np.tanh(scaled / softcap)
    slope = scale * (np.ones_like(z) if softcap is None else 1 / np.cosh(scaled / softcap) ** 2)
    at_z = losses(z)
    pad = [(0, 0), (0, raw.shape[1] - z.shape[1])]
    return Losses(at_z.kd, at_z.ce, np.pad(at_z.d_kd * slope, pad), np.pad(at_z.d_ce * slope, pad))


def differences(value: Callable[[Floats], float], z: Floats, places: list[tuple[int, int]]) -> Floats:
    """Return central finite differences of a scalar at some coordinates of z."""
    slopes = []
    for place in places:
        bump = np.zeros_like(z)
        bump[place] = 1e-5
        slopes.append((value(z + bump) - value(z - bump)) / 2e-5)
    return np.array(slopes)
