"""Divergences of a student's distribution q from a teacher's p, cell by cell: what `bucket` and `dense` sum.

A divergence is two functions of a cell, in logarithms, so that neither an underflow nor a distance of 200 nats between
the two hurts: its value f, with D = sum_c f_c, and its scaled slope h = q · df/dq, which is finite where q underflows.
Where q = softmax(s) and a cell c holds one token or several, a token v of it has

    dD/ds_v = (q_v / q_c) · (h_c - q_c · G),   G = sum_c h_c

As q sums to 1 over the cells, a multiple of q may be added to h at will: it cancels, and `slope` leaves it out. Nothing
is assumed about the sum of p. Cells with p = 0 or q = 0 take the limits: 0 · log 0 = 0.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx


class Divergence(Protocol):
    """The two functions of a cell; arrays of one shape, or broadcast to it, float32, log 0 = -inf."""

    def value(self, p: mx.array, log_p: mx.array, q: mx.array, log_q: mx.array) -> mx.array:
        """Return f."""
        ...

    def slope(self, p: mx.array, log_p: mx.array, q: mx.array, log_q: mx.array) -> mx.array:
        """Return h = q · df/dq, up to a multiple of q."""
        ...


@dataclass(frozen=True)
class ForwardKL:
    """KL(p ‖ q): f = p log(p / q), h = -p. Infinite where p > 0 and q = 0."""

    def value(self, p: mx.array, log_p: mx.array, q: mx.array, log_q: mx.array) -> mx.array:
        del q
        return mx.where(p > 0, p * (log_p - log_q), 0)

    def slope(self, p: mx.array, log_p: mx.array, q: mx.array, log_q: mx.array) -> mx.array:
        del log_p, q, log_q
        return -p


@dataclass(frozen=True)
class ReverseKL:
    """KL(q ‖ p): f = h = q log(q / p). Infinite where p = 0 and q > 0, and the gradient there is not finite either."""

    def value(self, p: mx.array, log_p: mx.array, q: mx.array, log_q: mx.array) -> mx.array:
        del p
        return mx.where(q == 0, 0, q * (log_q - log_p))

    slope = value


@dataclass(frozen=True)
class JSD:
    """beta KL(p ‖ m) + (1 - beta) KL(q ‖ m), m = beta p + (1 - beta) q; h = (1 - beta) q log(q / m). At most log 2.

    Reference: Agarwal et al. 2024 (GKD), section 2; beta is the weight on the teacher, in (0, 1), as in TRL.
    """

    beta: float = 0.5

    def __post_init__(self) -> None:
        _check_inside("beta", self.beta)

    def value(self, p: mx.array, log_p: mx.array, q: mx.array, log_q: mx.array) -> mx.array:
        p_over_m = mx.where(p > 0, p * log_over_mixture(log_p, log_q, self.beta), 0)
        return self.beta * p_over_m + self.slope(p, log_p, q, log_q)

    def slope(self, p: mx.array, log_p: mx.array, q: mx.array, log_q: mx.array) -> mx.array:
        del p
        return (1 - self.beta) * mx.where(q == 0, 0, q * log_over_mixture(log_q, log_p, 1 - self.beta))


@dataclass(frozen=True)
class SkewKL:
    """KL(p ‖ m), m = lam p + (1 - lam) q: f = p log(p / m), h = -(1 - lam) p q / m. At most log(1 / lam).

    Reference: Ko et al. 2024 (DistiLLM), section 3.1; lam is their alpha.
    """

    lam: float = 0.1

    def __post_init__(self) -> None:
        _check_inside("lam", self.lam)

    def value(self, p: mx.array, log_p: mx.array, q: mx.array, log_q: mx.array) -> mx.array:
        del q
        return mx.where(p > 0, p * log_over_mixture(log_p, log_q, self.lam), 0)

    def slope(self, p: mx.array, log_p: mx.array, q: mx.array, log_q: mx.array) -> mx.array:
        del q
        q_over_m = mx.exp(log_over_mixture(log_q, log_p, 1 - self.lam))
        return mx.where(p > 0, -(1 - self.lam) * p * q_over_m, 0)


@dataclass(frozen=True)
class SkewReverseKL:
    """KL(q ‖ m), m = (1 - lam) p + lam q: f = q log(q / m), h = q (log(q / m) - lam q / m). At most log(1 / lam).

    Reference: Ko et al. 2024 (DistiLLM), section 3.1; lam is their alpha.
    """

    lam: float = 0.1

    def __post_init__(self) -> None:
        _check_inside("lam", self.lam)

    def value(self, p: mx.array, log_p: mx.array, q: mx.array, log_q: mx.array) -> mx.array:
        del p
        return mx.where(q == 0, 0, q * log_over_mixture(log_q, log_p, self.lam))

    def slope(self, p: mx.array, log_p: mx.array, q: mx.array, log_q: mx.array) -> mx.array:
        del p
        log_ratio = log_over_mixture(log_q, log_p, self.lam)
        return mx.where(q == 0, 0, q * (log_ratio - self.lam * mx.exp(log_ratio)))


@dataclass(frozen=True)
class TVD:
    """Total variation: f = |p - q| / 2, h = q sign(q - p) / 2. At most 1; where p = q the slope is taken as 0."""

    def value(self, p: mx.array, log_p: mx.array, q: mx.array, log_q: mx.array) -> mx.array:
        del log_p, log_q
        return mx.abs(p - q) / 2

    def slope(self, p: mx.array, log_p: mx.array, q: mx.array, log_q: mx.array) -> mx.array:
        del log_p, log_q
        return q * mx.sign(q - p) / 2


def log_over_mixture(log_x: mx.array, log_y: mx.array, weight: float) -> mx.array:
    """Return log(x / m) of m = weight · x + (1 - weight) · y, for x > 0, or -inf for x = 0 < y.

    From the difference of the logarithms alone, so it neither overflows nor loses digits to their size.
    """
    return -mx.logaddexp(math.log(weight), math.log1p(-weight) + (log_y - log_x))


def _check_inside(name: str, weight: float) -> None:
    if not 0 < weight < 1:
        raise ValueError(f"{name} must lie inside (0, 1), found {weight}; the ends are ForwardKL() and ReverseKL()")
