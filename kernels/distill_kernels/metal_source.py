"""Metal that several kernels share: reading logits, log-sum-exp, and sums over a threadgroup.

Log-sum-exp is online (Milakov and Gimelshein, 2018): one pass keeps the largest value and the sum relative to it. A
-inf logit adds nothing, a NaN makes the result NaN. `metal::precise` functions throughout: accuracy is part of the
definition, and the kernels wait for memory, not for arithmetic.
"""

import math

from distill_kernels.logits_loss import LogitsLoss
from distill_kernels.row_loss import Arrays

import mlx.core as mx


def options(loss: LogitsLoss, own: float) -> mx.array:
    """A loss's numbers as its kernels read them, [6]: temperature, scale, softcap or 0, its own and two logarithms."""
    logs = (math.log(own), math.log1p(-own)) if 0 < own < 1 else (0.0, 0.0)
    return mx.array([loss.temperature, loss.scale, loss.softcap or 0.0, own, *logs], mx.float32)


def as_ids(ids: mx.array) -> mx.array:
    """Return ids as the kernels read them, uint32; what does not fit becomes 2^31 - 1, which no vocabulary holds."""
    if ids.dtype in (mx.int32, mx.uint32):
        return mx.contiguous(ids.astype(mx.uint32))
    wide, nobody = ids.astype(mx.int64), 2**31 - 1
    return mx.contiguous(mx.where((wide >= 0) & (wide < nobody), wide, nobody).astype(mx.uint32))


def gradient_inputs(saved: Arrays, cotangents: Arrays) -> dict[str, mx.array]:
    """What a gradient takes beside a loss's inputs, without gaps: a cotangent is often one number, broadcast."""
    arrays = saved[0], *cotangents
    return {name: mx.contiguous(array) for name, array in zip(("saved", "ct_kd", "ct_ce"), arrays, strict=True)}


COMMON = """
constant constexpr uint PER_THREAD = 4;

// A row's softmax normaliser so far: log(sum exp(x)) = largest + log(sum).
struct Normaliser {
    float largest;
    float sum;
};

constant constexpr float NEGATIVE_INFINITY = -metal::numeric_limits<float>::infinity();

inline float finite_or_zero(float x) {
    return x == NEGATIVE_INFINITY ? 0.0f : x;
}

template <int N>
inline void include(thread Normaliser& to, const thread float* values) {
    float largest = to.largest;
    for (int i = 0; i < N; i++) {
        largest = metal::max(largest, values[i]);
    }
    const float shift = finite_or_zero(largest);
    float sum = to.sum * metal::precise::exp(to.largest - shift);
    for (int i = 0; i < N; i++) {
        sum += metal::precise::exp(values[i] - shift);
    }
    to.largest = largest;
    to.sum = sum;
}

inline float log_of(Normaliser n) {
    return n.sum == 0.0f ? NEGATIVE_INFINITY : n.largest + metal::precise::log(n.sum);
}

inline float log_add(float a, float b) {
    const float most = a < b ? b : a;  // metal::max would drop a NaN
    if (metal::isinf(most) && !metal::isnan(b)) {
        return most;
    }
    return most + log1p(metal::precise::exp(-metal::abs(a - b)));
}

// A loss's own number, and the logarithms of it and of 1 - it, where it is the weight of a mixture.
struct Parameter {
    float value;
    float log_value;
    float log_rest;
};

// What every thread of a group knows of its place in it.
struct Place {
    uint lane;
    uint simd;
    uint simds;
};

// Sum over the threadgroup, the same bits in every thread. `parts` [32] may be used again at once.
inline float group_sum(float x, threadgroup float* parts, Place at) {
    x = simd_sum(x);
    if (at.lane == 0) {
        parts[at.simd] = x;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    x = simd_sum(at.lane < at.simds ? parts[at.lane] : 0.0f);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    return x;
}

inline float group_max(float x, threadgroup float* parts, Place at) {
    x = simd_max(x);
    if (at.lane == 0) {
        parts[at.simd] = x;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    x = simd_max(at.lane < at.simds ? parts[at.lane] : NEGATIVE_INFINITY);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    return x;
}

inline float group_log(Normaliser part, threadgroup float* parts, Place at) {
    Normaliser all;
    all.largest = group_max(part.largest, parts, at);
    all.sum = group_sum(part.sum * metal::precise::exp(part.largest - finite_or_zero(all.largest)), parts, at);
    return log_of(all);
}

// The model's logit from the head's raw output: scaled, then capped where there is a cap.
struct Final {
    float scale;
    float softcap;

    float operator()(float raw) const {
        const float z = raw * scale;
        return softcap > 0.0f ? softcap * metal::precise::tanh(z / softcap) : z;
    }

    // Its derivative with respect to the raw output.
    float slope(float final) const {
        const float share = softcap > 0.0f ? final / softcap : 0.0f;
        return scale * (1.0f - share * share);
    }
};
"""
