"""What sets one loss on sparse targets apart, as Metal: how entries become a value, and what they do to a gradient.

A gradient by z / T is coefficient · exp(z / T - normaliser) at every id, and at an entry what is added to that, or, in
the losses with a bucket, put in its place.
"""

import math
from typing import NamedTuple, cast

from distill_kernels import divergence_metal
from distill_kernels.bucket import BucketKL, BucketLoss
from distill_kernels.logits_loss import LogitsLoss
from distill_kernels.ranking import TIE, HingeRank, LogisticRank
from distill_kernels.sampled import SampledLoss
from distill_kernels.sparse_kl import SoftCE, SparseKL


class LossSource(NamedTuple):
    """A loss as Metal."""

    name: str
    header: str
    value: str
    """Sets `loss` and `total`, from `kept` and the normalisers."""
    gradient: str
    """Sets `coefficient` and `normaliser`, and puts what each entry adds into `added`."""
    replaces: bool = False
    """Whether an entry takes the place of its share of the softmax, which then is over all other ids."""
    ranks: bool = False
    """Whether it looks at pairs of entries."""


# Opens two blocks, which whoever uses it closes: the entries that count, one after another.
_EACH = """
        for (uint i = tid; i < k; i += threads) {
            const float p = kept[i];
            if (p > 0.0f) {
                const float s = final_of(float(row[long(row_ids[i]) * step])) / temperature;
"""
_PUT = """
                added[insert(table, slots, row_ids[i])] = """


def _linear(name: str, cost: str) -> LossSource:
    return LossSource(
        name,
        "",
        f"""
        float sum = 0.0f;
        float mass = 0.0f;
        {_EACH}
                sum += p * ({cost});
                mass += p;
            }}
        }}
        loss = temperature * temperature * group_sum(sum, parts, at);
        total = group_sum(mass, parts, at);
""",
        f"""
        const float a = temperature * ct;
        coefficient = a * total;
        for (uint i = tid; i < k; i += threads) {{
            if (kept[i] > 0.0f) {{
                {_PUT} -a * kept[i];
            }}
        }}
""",
    )


def _bucket(loss: BucketLoss) -> LossSource:
    return LossSource(
        type(loss.divergence).__name__.lower(),
        divergence_metal.functions(loss.divergence),
        f"""
        const Cell tail = cell_of(metal::precise::exp(log_tail), log_tail, -log_add(0.0f, lse_kept - lse_rest));
        const float lse_s = finite_or_zero(lse_kept) + log_add(0.0f, lse_rest - lse_kept);
        float sum = 0.0f;
        float slopes = 0.0f;
        {_EACH}
                const Cell cell = cell_of(p, metal::precise::log(p), s - lse_s);
                sum += cell_value(cell, parameter);
                slopes += cell_slope(cell, parameter);
            }}
        }}
        loss = temperature * temperature * (group_sum(sum, parts, at) + cell_value(tail, parameter));
        total = group_sum(slopes, parts, at) + cell_slope(tail, parameter);
""",
        f"""
        const float a = temperature * ct;
        const Cell tail = cell_of(metal::precise::exp(log_tail), log_tail, -log_add(0.0f, lse_kept - lse_rest));
        const float lse_s = finite_or_zero(lse_kept) + log_add(0.0f, lse_rest - lse_kept);
        coefficient = a != 0.0f ? a * (cell_slope(tail, parameter) - tail.q * total) : 0.0f;
        normaliser = lse_rest;
        {_EACH}
                const Cell cell = cell_of(p, metal::precise::log(p), s - lse_s);
                {_PUT} a != 0.0f ? a * (cell_slope(cell, parameter) - cell.q * total) : 0.0f;
            }}
        }}
""",
        replaces=True,
    )


def _sampled(loss: SampledLoss) -> LossSource:
    cell = """
                const float log_p = log_probs[size_t(n) * k + i];
                const Cell cell = cell_of(metal::precise::exp(log_p), log_p, s - lse_t);
                const float inverse = metal::precise::exp(metal::precise::log(p) - log_p);
"""
    return LossSource(
        f"sampled_{type(loss.divergence).__name__.lower()}",
        divergence_metal.functions(loss.divergence),
        f"""
        float sum = 0.0f;
        float slopes = 0.0f;
        {_EACH}{cell}
                sum += inverse * cell_value(cell, parameter);
                slopes += inverse * cell_slope(cell, parameter);
            }}
        }}
        loss = temperature * temperature * group_sum(sum, parts, at);
        total = group_sum(slopes, parts, at);
""",
        f"""
        const float a = temperature * ct;
        coefficient = -a * total;
        {_EACH}{cell}
                {_PUT} a * inverse * cell_slope(cell, parameter);
            }}
        }}
""",
    )


_SCORES = """
        for (uint i = tid; i < k; i += threads) {
            const float s = kept[i] > 0.0f ? final_of(float(row[long(row_ids[i]) * step])) / temperature : 0.0f;
            scores[i] = RANKED_BY;
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
"""


def _rank(name: str, ranked_by: str, on_entry: str, header: str) -> LossSource:
    scores = _SCORES.replace("RANKED_BY", ranked_by)
    return LossSource(
        name,
        f"constant constexpr float TIE = {TIE}f;\n{header}",
        f"""{scores}
        float sum = 0.0f;
        float count = 0.0f;
        for (uint i = tid; i < k; i += threads) {{
            for (uint j = 0; j < k; j++) {{
                if (kept[j] > 0.0f && kept[i] - kept[j] > TIE) {{
                    sum += {name}_value(kept[i] - kept[j], scores[i], scores[j], parameter);
                    count += 1.0f;
                }}
            }}
        }}
        total = metal::max(group_sum(count, parts, at), 1.0f);
        loss = group_sum(sum, parts, at) / total;
""",
        f"""{scores}
        const float a = ct / (temperature * total);
        float whole = 0.0f;
        for (uint i = tid; i < k; i += threads) {{
            if (kept[i] > 0.0f) {{
                float u = 0.0f;
                for (uint j = 0; j < k; j++) {{
                    if (kept[j] > 0.0f && kept[i] - kept[j] > TIE) {{
                        u += {name}_slope(kept[i] - kept[j], scores[i], scores[j], parameter);
                    }}
                    if (kept[j] > 0.0f && kept[j] - kept[i] > TIE) {{
                        u -= {name}_slope(kept[j] - kept[i], scores[j], scores[i], parameter);
                    }}
                }}
                {on_entry}
                whole += u;
                {_PUT} a * u;
            }}
        }}
        {"coefficient = -a * group_sum(whole, parts, at);" if name == "hinge" else ""}
""",
        ranks=True,
    )


def source_of(loss: LogitsLoss) -> LossSource:
    """The Metal of a loss.

    Raises:
        TypeError: it has none.
    """
    if type(loss) is SoftCE:
        return _linear("soft_ce", "lse_t - s")
    if type(loss) is SparseKL:
        return _linear("sparse_kl", "lse_t - s + metal::precise::log(p)")
    if type(loss) in (BucketLoss, BucketKL):
        return _bucket(cast(BucketLoss, loss))
    if type(loss) is SampledLoss:
        return _sampled(loss)
    if type(loss) is HingeRank:
        return _rank("hinge", "metal::precise::exp(s - lse_t)", "u *= scores[i];", _HINGE)
    if type(loss) is LogisticRank:
        return _rank("logistic", "s", "", _LOGISTIC)
    raise TypeError(f"{type(loss).__name__} has no Metal kernel")


_HINGE = """
inline float short_by(float gap, float above, float below, Parameter margin) {
    return (metal::isinf(margin.value) ? gap : margin.value) - (above - below);
}
inline float hinge_value(float gap, float above, float below, Parameter margin) {
    const float missing = short_by(gap, above, below, margin);
    return missing < 0.0f ? 0.0f : missing;  // metal::max would drop a NaN
}
inline float hinge_slope(float gap, float above, float below, Parameter margin) {
    return short_by(gap, above, below, margin) > 0.0f ? -1.0f : 0.0f;
}
"""

_LOGISTIC = """
inline float logistic_value(float, float above, float below, Parameter) {
    return above == below ? log_add(0.0f, 0.0f) : log_add(0.0f, below - above);
}
inline float logistic_slope(float, float above, float below, Parameter) {
    return above == below ? -0.5f : -1.0f / (1.0f + metal::precise::exp(above - below));
}
"""


def parameter_of(loss: LogitsLoss) -> float:
    if isinstance(loss, (BucketLoss, SampledLoss)):
        return divergence_metal.parameter(loss.divergence)
    margin = getattr(loss, "margin", None)
    return math.inf if margin is None else float(margin)
