"""The divergences of `divergence` in Metal: value f and scaled slope h = q · df/dq of a cell, in the same notation."""

from distill_kernels.divergence import JSD, TVD, Divergence, ForwardKL, ReverseKL, SkewKL, SkewReverseKL

_MIXTURE = """
// log(x / m) of m = weight x + (1 - weight) y.
inline float log_over_mixture(float log_x, float log_y, float log_weight, float log_rest) {
    return -log_add(log_weight, log_rest + (log_y - log_x));
}
"""

_FUNCTIONS: dict[type, str] = {
    ForwardKL: """
inline float cell_value(Cell c, Parameter) { return c.p > 0.0f ? c.p * (c.log_p - c.log_q) : 0.0f; }
inline float cell_slope(Cell c, Parameter) { return -c.p; }
""",
    ReverseKL: """
inline float cell_value(Cell c, Parameter) { return c.q == 0.0f ? 0.0f : c.q * (c.log_q - c.log_p); }
inline float cell_slope(Cell c, Parameter) { return cell_value(c, Parameter()); }
""",
    JSD: """
inline float cell_slope(Cell c, Parameter beta) {
    const float log_ratio = log_over_mixture(c.log_q, c.log_p, beta.log_rest, beta.log_value);
    return c.q == 0.0f ? 0.0f : (1.0f - beta.value) * c.q * log_ratio;
}
inline float cell_value(Cell c, Parameter beta) {
    const float p_over_m = c.p > 0.0f ? c.p * log_over_mixture(c.log_p, c.log_q, beta.log_value, beta.log_rest) : 0.0f;
    return beta.value * p_over_m + cell_slope(c, beta);
}
""",
    SkewKL: """
inline float cell_value(Cell c, Parameter lam) {
    return c.p > 0.0f ? c.p * log_over_mixture(c.log_p, c.log_q, lam.log_value, lam.log_rest) : 0.0f;
}
inline float cell_slope(Cell c, Parameter lam) {
    const float q_over_m = metal::precise::exp(log_over_mixture(c.log_q, c.log_p, lam.log_rest, lam.log_value));
    return c.p > 0.0f ? -(1.0f - lam.value) * c.p * q_over_m : 0.0f;
}
""",
    SkewReverseKL: """
inline float cell_value(Cell c, Parameter lam) {
    return c.q == 0.0f ? 0.0f : c.q * log_over_mixture(c.log_q, c.log_p, lam.log_value, lam.log_rest);
}
inline float cell_slope(Cell c, Parameter lam) {
    const float log_ratio = log_over_mixture(c.log_q, c.log_p, lam.log_value, lam.log_rest);
    return c.q == 0.0f ? 0.0f : c.q * (log_ratio - lam.value * metal::precise::exp(log_ratio));
}
""",
    TVD: """
inline float cell_value(Cell c, Parameter) { return metal::abs(c.p - c.q) / 2.0f; }
inline float cell_slope(Cell c, Parameter) {
    return c.q > c.p ? c.q / 2.0f : c.q < c.p ? -c.q / 2.0f : 0.0f;
}
""",
}

_CELL = """
struct Cell {
    float p;
    float log_p;
    float q;
    float log_q;
};

inline Cell cell_of(float p, float log_p, float log_q) {
    const Cell c = {p, log_p, metal::precise::exp(log_q), log_q};
    return c;
}
"""


def functions(divergence: Divergence) -> str:
    """Metal source of `cell_value(Cell, parameter)` and `cell_slope(Cell, parameter)`.

    Raises:
        TypeError: it is a user's own.
    """
    if type(divergence) not in _FUNCTIONS:
        raise TypeError(f"{type(divergence).__name__} has no Metal kernel")
    return _CELL + _MIXTURE + _FUNCTIONS[type(divergence)]


def parameter(divergence: Divergence) -> float:
    """The divergence's one parameter, 1/2 where it has none."""
    return float(getattr(divergence, "beta", getattr(divergence, "lam", 0.5)))
