"""Metal that several kernels share: reading logits, log-sum-exp, and sums over a threadgroup.

Log-sum-exp is online (Milakov and Gimelshein, 2018): one pass keeps the largest value and the sum relative to it. A
-inf logit adds nothing, a NaN makes the result NaN. `metal::precise` functions throughout: accuracy is part of the
definition, and the kernels wait for memory, not for arithmetic.
"""

from distill_kernels.metal import PER_THREAD

ROW = """
    const uint tid = thread_index_in_threadgroup;
    const uint threads = threads_per_threadgroup.x;
    const uint n = threadgroup_position_in_grid.y;
    const Place at = {thread_index_in_simdgroup, simdgroup_index_in_threadgroup, simdgroups_per_threadgroup};
    const uint vocab = sizes[0];
    const auto row = logits + long(n) * long(logits_strides[0]);
    const long step = long(logits_strides[1]);
    threadgroup float parts[32];
"""
"""How every kernel begins: which thread this is, and where its row of `logits` lies."""

COMMON = (
    f"""
constant constexpr uint PER_THREAD = {PER_THREAD};
"""
    """
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
"""
)
