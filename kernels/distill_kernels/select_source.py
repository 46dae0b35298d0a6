"""The Metal that reads every logit of a row, once: each block's largest logit and mass, entropy, label, log Z.

Threads side by side take blocks side by side, whose elements are neighbours in memory. One thread adds up a whole
block, so that a block's mass does not depend on the order in which threads come.
"""

from distill_kernels.select import BLOCK_SIZE

MOMENTS = (
    f"""
constant constexpr uint BLOCK = {BLOCK_SIZE};
"""
    """
// A softmax so far, and what its entropy needs: weighted = sum (x - largest) exp(x - largest).
struct Moments {
    float largest;
    float sum;
    float weighted;
};

inline void raise(thread Moments& m, float largest) {
    const float rise = m.largest - finite_or_zero(largest);
    const float share = metal::precise::exp(rise);
    m.weighted = share == 0.0f ? 0.0f : share * (m.weighted + rise * m.sum);
    m.sum *= share;
    m.largest = largest;
}

inline void add(thread Moments& m, float x) {
    const float e = metal::precise::exp(x);
    m.sum += e;
    m.weighted += e == 0.0f ? 0.0f : x * e;
}

template <int N>
inline void include(thread Moments& m, const thread float* values) {
    float largest = m.largest;
    for (int i = 0; i < N; i++) {
        largest = metal::max(largest, values[i]);
    }
    raise(m, largest);
    for (int i = 0; i < N; i++) {
        add(m, values[i] - finite_or_zero(largest));
    }
}

inline void join(thread Moments& m, Moments other) {
    const float largest = metal::max(m.largest, other.largest);
    raise(m, largest);
    raise(other, largest);
    m.sum += other.sum;
    m.weighted += other.weighted;
}
"""
)

BLOCKS = """
    const uint blocks = sizes[1];
    const float temperature = temperatures[0];
    const auto row_best = best + size_t(n) * blocks;
    const auto row_mass = mass + size_t(n) * blocks;
    const uint label = labels[n];

    Moments plain = {NEGATIVE_INFINITY, 0.0f, 0.0f};
    float most = NEGATIVE_INFINITY;
    float at_label = NEGATIVE_INFINITY;
    for (uint b = tid; b < blocks; b += threads) {
        Moments block = {NEGATIVE_INFINITY, 0.0f, 0.0f};
        for (uint first = 0; first < BLOCK; first += PER_THREAD) {
            float z[PER_THREAD];
            float s[PER_THREAD];
            for (uint i = 0; i < PER_THREAD; i++) {
                const uint id = (first + i) * blocks + b;
                z[i] = id < vocab ? float(row[long(id) * step]) : NEGATIVE_INFINITY;
                s[i] = z[i] / temperature;
                at_label = id == label ? z[i] : at_label;
            }
            include<PER_THREAD>(block, s);
            if (TEMPERED) {
                include<PER_THREAD>(plain, z);
            }
        }
        if (!TEMPERED) {
            join(plain, block);
        }
        row_best[b] = block.largest;
        row_mass[b] = block.sum;
        most = metal::max(most, block.largest);
    }
    most = group_max(most, parts, at);
    for (uint b = tid; b < blocks; b += threads) {
        const float below = row_best[b] - most;
        row_best[b] = below;
        row_mass[b] *= metal::precise::exp(below);
    }
    at_label = group_max(at_label, parts, at);
    raise(plain, group_max(plain.largest, parts, at));
    const float sum = group_sum(plain.sum, parts, at);
    const float weighted = group_sum(plain.weighted, parts, at);
    if (tid == 0) {
        const float log_sum = metal::precise::log(sum);
        const float h = log_sum - weighted / sum;
        entropy[n] = h;
        label_log_prob[n] = at_label - plain.largest - log_sum;
        largest[n] = metal::isfinite(h) && metal::isfinite(most) ? most : NAN;
    }
"""

LOG_Z = """

    Normaliser part[COUNT];
    for (uint t = 0; t < COUNT; t++) {
        part[t] = {NEGATIVE_INFINITY, 0.0f};
    }
    for (uint first = tid * PER_THREAD; first < vocab; first += threads * PER_THREAD) {
        float z[PER_THREAD];
        float s[PER_THREAD];
        for (uint i = 0; i < PER_THREAD; i++) {
            z[i] = first + i < vocab ? float(row[long(first + i) * step]) : NEGATIVE_INFINITY;
        }
        for (uint t = 0; t < COUNT; t++) {
            for (uint i = 0; i < PER_THREAD; i++) {
                s[i] = z[i] / temperatures[t];
            }
            include<PER_THREAD>(part[t], s);
        }
    }
    // The first is temperature 1. Without the largest logit, that both logarithms would hold, nothing cancels.
    float log_sum = 0.0f;
    for (uint t = 0; t < COUNT; t++) {
        const float largest = group_max(part[t].largest, parts, at);
        const float share = metal::precise::exp(part[t].largest - finite_or_zero(largest));
        const float log_sum_t = metal::precise::log(group_sum(part[t].sum * share, parts, at));
        log_sum = t == 0 ? log_sum_t : log_sum;
        if (tid == 0 && t > 0) {
            log_z[size_t(n) * (COUNT - 1) + t - 1] = log_sum_t - log_sum / temperatures[t];
        }
    }
"""
