"""The Metal that chooses what is kept of a row, from what `select_source.BLOCKS` left of it.

`ENTRIES` reads only the blocks that can hold one of the k largest, and `DRAWN` those that a draw fell into. Keys order
(logit, id), so that equal logits go by rising id, and whether a token is one of the head is a comparison. All threads
of a group come to every barrier: what decides a `return` is the same for the whole row.
"""

from distill_kernels.select import HEAD_MARGIN, UNITS

KEYS = (
    f"""
constant constexpr float HEAD_MARGIN = {HEAD_MARGIN}f;
constant constexpr float UNITS = {float(UNITS)}f;
"""
    """
constant constexpr uint DIGIT_BITS = 5;
constant constexpr uint DIGITS = 32;

// Keys are whole numbers that order as (value, -id) do, so no two are equal; 0 is nobody's.
inline ulong key_of(float value, uint id) {
    const uint bits = as_type<uint>(value);
    const uint rising = bits >> 31 ? ~bits : bits | 0x80000000u;
    return (ulong(rising) << 32) | ulong(~id);
}

inline uint id_of(ulong key) {
    return ~uint(key);
}

inline float prob_of(ulong key) {
    const uint rising = uint(key >> 32);
    return key == 0 ? 0.0f : metal::precise::exp(as_type<float>(rising >> 31 ? rising & 0x7fffffffu : ~rising));
}

template <typename Values>
struct BlockKeys {
    Values values;

    ulong operator()(uint i) const {
        return key_of(values[i], i);
    }
};

template <bool WHOLE>
struct CandidateKeys {
    const device float* values;
    const threadgroup uint* chosen;
    uint blocks;

    uint block(uint c) const {
        return WHOLE ? c : chosen[c];
    }

    ulong operator()(uint i) const {
        return key_of(values[i], i % BLOCK * blocks + block(i / BLOCK));
    }
};

// A key that exactly `wanted` of `count` keys reach, 0 < wanted <= count: digit by digit, from the highest.
template <typename Keys>
inline ulong least_of_largest(
    Keys keys, uint count, uint wanted, threadgroup metal::atomic_uint* bins, uint tid, uint threads, Place at) {
    ulong known = 0;
    for (uint shift = 60;; shift -= DIGIT_BITS) {
        if (tid < DIGITS) {
            metal::atomic_store_explicit(&bins[tid], 0u, metal::memory_order_relaxed);
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        for (uint i = tid; i < count; i += threads) {
            const ulong digits = keys(i) >> shift;
            if (digits >> DIGIT_BITS == known) {
                metal::atomic_fetch_add_explicit(&bins[digits % DIGITS], 1u, metal::memory_order_relaxed);
            }
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        const uint digit = DIGITS - 1 - at.lane;
        const uint here = metal::atomic_load_explicit(&bins[digit], metal::memory_order_relaxed);
        const uint above = simd_prefix_exclusive_sum(here);
        const bool is_it = above < wanted && wanted <= above + here;
        known = known << DIGIT_BITS | ulong(simd_sum(is_it ? digit : 0u));
        const bool whole_bin = simd_any(is_it && wanted == above + here);
        wanted -= simd_sum(is_it ? above : 0u);
        threadgroup_barrier(mem_flags::mem_threadgroup);
        if (whole_bin || shift == 0) {
            return known << shift;
        }
    }
}

// The sum of x up to and with this thread, left in `sums` for all. A simdgroup's own prefix sums know no `long`.
template <typename X>
inline X running_sum(X x, threadgroup X* sums, uint tid, uint threads) {
    sums[tid] = x;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint distance = 1; distance < threads; distance *= 2) {
        const X before = tid >= distance ? sums[tid - distance] : X(0);
        threadgroup_barrier(mem_flags::mem_threadgroup);
        x += before;
        sums[tid] = x;
        threadgroup_barrier(mem_flags::mem_threadgroup);
    }
    return x;
}

// Mass of a candidate block's tokens below a key, the same in every lane.
template <typename Keys>
inline float mass_below(Keys keys, uint candidate, ulong limit, uint lane) {
    float sum = 0.0f;
    for (uint i = candidate * BLOCK + lane; i < (candidate + 1) * BLOCK; i += 32) {
        const ulong key = keys(i);
        sum += key < limit ? prob_of(key) : 0.0f;
    }
    return simd_sum(sum);
}

// Whole units of total / 2^34: their running sums are exact, those of float32 would move 1 draw in 200.
inline long units_of(float mass, float total) {
    return long(mass / total * UNITS);
}
"""
)

ENTRIES = """
    const uint blocks = sizes[1];
    const uint k = sizes[2];
    const uint candidates = sizes[3];
    const float temperature = temperatures[0];
    const float most = largest[n];
    const auto row_ids = ids + size_t(n) * k;
    const auto row_probs = probs + size_t(n) * k;
    const auto row_values = values + size_t(n) * candidates * BLOCK;
    const auto row_rest = rest + size_t(n) * blocks;

    threadgroup metal::atomic_uint bins[DIGITS];
    threadgroup metal::atomic_uint found;
    threadgroup uint chosen[WHOLE ? 1 : K];
    threadgroup ulong top[K];
    threadgroup float sums[THREADS];

    for (uint i = tid; i < k; i += threads) {
        row_ids[i] = 0;
        row_probs[i] = metal::isnan(most) ? NAN : 0.0f;
    }
    if (metal::isnan(most)) {  // no distribution
        if (tid == 0) {
            head_count[n] = 0;
            tail_mass[n] = NAN;
        }
        return;
    }

    if (tid == 0) {
        metal::atomic_store_explicit(&found, 0u, metal::memory_order_relaxed);
    }
    if (!WHOLE) {
        const BlockKeys<decltype(best + 0)> block_keys = {best + size_t(n) * blocks};
        const ulong least = least_of_largest(block_keys, blocks, candidates, bins, tid, threads, at);
        for (uint b = tid; b < blocks; b += threads) {
            if (block_keys(b) >= least) {
                chosen[metal::atomic_fetch_add_explicit(&found, 1u, metal::memory_order_relaxed)] = b;
            }
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        if (tid == 0) {
            metal::atomic_store_explicit(&found, 0u, metal::memory_order_relaxed);
        }
    }
    const CandidateKeys<WHOLE> keys = {row_values, chosen, blocks};
    const uint count = candidates * BLOCK;
    for (uint i = tid; i < count; i += threads) {
        const uint id = i % BLOCK * blocks + keys.block(i / BLOCK);
        row_values[i] = id < vocab ? float(row[long(id) * step]) / temperature - most : NEGATIVE_INFINITY;
    }
    for (uint b = tid; b < blocks; b += threads) {
        row_rest[b] = mass[size_t(n) * blocks + b];
    }
    if (tid < K) {
        top[tid] = 0;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup | mem_flags::mem_device);

    // The largest, in whatever order the threads come; then each takes its rank's place.
    const ulong least = least_of_largest(keys, count, metal::min(k, count), bins, tid, threads, at);
    for (uint i = tid; i < count; i += threads) {
        const ulong key = keys(i);
        if (key >= least) {
            top[metal::atomic_fetch_add_explicit(&found, 1u, metal::memory_order_relaxed)] = key;
        }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    const ulong own = tid < k ? top[tid] : 0;
    uint rank = 0;
    for (uint i = 0; i < k && own != 0; i++) {
        rank += top[i] > own ? 1 : 0;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (own != 0) {
        top[rank] = own;
    }

    // Mass outside the k largest: of the blocks without one as they are, of the others from what is left of them.
    for (uint c = at.simd; c < candidates; c += at.simds) {
        const float left = mass_below(keys, c, least, at.lane);
        if (at.lane == 0) {
            row_rest[keys.block(c)] = left;
        }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup | mem_flags::mem_device);
    float part = 0.0f;
    for (uint b = tid; b < blocks; b += threads) {
        part += row_rest[b];
    }
    const float outside = group_sum(part, parts, at);
    // From the smallest: mass from rank h on is outside + sums[k - 1 - h], and nothing cancels.
    running_sum(tid < k ? prob_of(top[k - 1 - tid]) : 0.0f, sums, tid, threads);
    const float total = outside + sums[k - 1];
    const float p = tid < k ? prob_of(top[tid]) : 0.0f;
    bool in_tail = p == 0.0f;
    if (DRAWS && tid < k) {
        const float tau = (outside + sums[k - 1 - tid]) / float(k - tid);
        in_tail = p <= tau * (1.0f - HEAD_MARGIN) || tau == 0.0f;
    }
    const uint head = k - uint(group_max(tid < k && in_tail ? float(k - tid) : 0.0f, parts, at));
    const float tail = outside + (head < k ? sums[k - 1 - head] : 0.0f);
    if (tid < head) {
        row_ids[tid] = id_of(top[tid]);
        row_probs[tid] = p / total;
    }
    if (tid == 0) {
        head_count[n] = int(head);
        tail_mass[n] = tail / total;
    }
"""

DRAWN = """
    threadgroup long ends[THREADS];
    threadgroup uint drawn[K];
    const uint draws = tail > 0.0f ? k - head : 0;
    if (draws == 0) {
        return;
    }
    // The ranks that turned out to be tail take part in the draw again.
    const ulong limit = head > 0 ? top[head - 1] : ~ulong(0);
    for (uint c = at.simd; c < candidates; c += at.simds) {
        const float left = mass_below(keys, c, limit, at.lane);
        if (at.lane == 0) {
            row_rest[keys.block(c)] = left;
        }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup | mem_flags::mem_device);

    // A thread adds up its stretch of the blocks in their random order; a draw finds the stretch, then the block.
    const auto order = block_order + size_t(n) * blocks;
    const uint stretch = (blocks + threads - 1) / threads;
    long units = 0;
    for (uint i = tid * stretch; i < metal::min((tid + 1) * stretch, blocks); i++) {
        units += units_of(row_rest[order[i]], tail);
    }
    running_sum(units, ends, tid, threads);
    uint id = 0;
    float prob = 0.0f;
    if (tid < draws) {
        const long whole = ends[threads - 1];
        const long each = whole / long(draws);
        const long slack = long(tid) * (whole % long(draws)) / long(draws);
        const long point = long(tid) * each + slack + ((each * long(start[n])) >> 24);
        uint low = 0;
        for (uint high = threads - 1; low < high;) {
            const uint middle = (low + high) / 2;
            if (ends[middle] <= point) {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        long begin = low > 0 ? ends[low - 1] : 0;
        uint place = low * stretch;
        const uint last = metal::min(place + stretch, blocks) - 1;
        for (; place < last; place++) {
            const long size = units_of(row_rest[order[place]], tail);
            if (begin + size > point) {
                break;
            }
            begin += size;
        }
        const float offset = float(point - begin) / UNITS * tail;
        const uint block = order[place];
        // Rounding may leave a point at the very end of its block: it belongs to the last id there that has mass.
        float inside = 0.0f;
        for (uint e = 0; e < BLOCK && inside <= offset; e++) {
            const uint here = e * blocks + block;
            float value = NEGATIVE_INFINITY;
            if (WHOLE) {
                value = row_values[block * BLOCK + e];
            } else if (here < vocab) {
                value = float(row[long(here) * step]) / temperature - most;
            }
            const ulong key = key_of(value, here);
            const float p_here = key < limit ? prob_of(key) : 0.0f;
            if (p_here > 0.0f) {
                id = here;
                prob = p_here;
            }
            inside += p_here;
        }
        drawn[tid] = id;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (tid < draws) {
        uint slot = head;
        for (uint i = 0; i < draws; i++) {
            slot += drawn[i] < id || (drawn[i] == id && i < tid) ? 1 : 0;
        }
        row_ids[slot] = id;
        row_probs[slot] = prob / total;
    }
"""
