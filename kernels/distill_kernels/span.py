"""Likelihoods of the same stretch of text under two tokenizers, brought together: approximate likelihood matching."""

import mlx.core as mx

TAU = 100.0
"""What likelihoods are tempered by in the paper that `span_divergence` names."""
BELOW = 1e-6
"""Nats that both log-likelihoods are lowered by, so that neither is 0."""


def span_divergence(teacher: mx.array, student: mx.array, tau: float = TAU) -> mx.array:
    """Return the divergence between two likelihoods of S spans, [S] float32, at least 0, and 0 where they are equal.

        a = exp((y_T - 1e-6) / tau),   b = exp((y_S - 1e-6) / tau)
        tau · (a log(a / b) + (1 - a) log((1 - a) / (1 - b)))

    the KL of two coins: whether the span is what comes next or not. As tau grows it tends to

        y_T - y_S + y_T log(y_S / y_T),

    so it is in nats of the span.

    Args:
        teacher: float32 [S]; y_T, the sum of the teacher's log-probs of a span's tokens. A constant.
        student: float32 [S]; y_S, the same of the student.
        tau: above 0.

    Reference: Minixhofer et al., "Universal Cross-Tokenizer Distillation via Approximate Likelihood Matching", 2025,
    without the factor tau.
    """
    log_a, log_b = ((mx.minimum(y, 0) - BELOW) / tau for y in (mx.stop_gradient(teacher), student))
    a = mx.exp(log_a)
    return tau * (a * (log_a - log_b) + (1 - a) * (_log1mexp(log_a) - _log1mexp(log_b)))


def _log1mexp(x: mx.array) -> mx.array:
    """log(1 - exp(x)) of x below 0."""
    return mx.log(-mx.expm1(x))
