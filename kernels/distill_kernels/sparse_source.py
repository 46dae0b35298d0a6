"""The Metal that all losses on sparse targets share: a row's entries, its normalisers, and its gradient.

Forward: an online log-sum-exp over the row, then the loss of its k entries. Backward: every logit is read once and its
gradient written once. The row's entries lie in threadgroup memory, in a hash table by id where a logit has to know
whether it is one of them, so no two threads write one place and nothing as wide as the vocabulary is ever kept.

`VALUE` and `GRADIENT` are a loss's own, from `sparse_source_losses`. All threads of a group come to every barrier: what
decides a `return` is the same for the whole row.
"""

from distill_kernels.coded import DRAWS_WEIGHT, LARGEST, STEPS_PER_NAT, ZERO

TABLE = """
// Ids in threadgroup memory, found by open addressing. Of one id there may be several.
constant constexpr int NOBODY = -1;

inline uint slot_of(uint id, uint slots) {
    return (id * 2654435769u) >> (metal::clz(slots) + 1);
}

inline uint insert(threadgroup metal::atomic_int* table, uint slots, uint id) {
    uint slot = slot_of(id, slots);
    while (true) {
        int found = NOBODY;
        if (metal::atomic_compare_exchange_weak_explicit(
                &table[slot], &found, int(id), metal::memory_order_relaxed, metal::memory_order_relaxed)) {
            return slot;
        }
        if (found != NOBODY) {
            slot = (slot + 1) & (slots - 1);
        }
    }
}

inline int id_at(threadgroup metal::atomic_int* table, uint slot) {
    return metal::atomic_load_explicit(&table[slot], metal::memory_order_relaxed);
}

inline bool holds(threadgroup metal::atomic_int* table, uint slots, uint id) {
    for (uint slot = slot_of(id, slots);; slot = (slot + 1) & (slots - 1)) {
        const int found = id_at(table, slot);
        if (found == int(id) || found == NOBODY) {
            return found != NOBODY;
        }
    }
}
"""

ENTRIES = """
    const uint k = uint(ids_shape[1]);
    const uint slots = 2 * K;
    const auto row_ids = ids + size_t(n) * k;
    threadgroup float kept[K];
    threadgroup float scores[RANKS ? K : 1];
    threadgroup float added[ADDS ? 2 * K : 1];
    threadgroup metal::atomic_int table[2 * K];
"""

TAIL = """
    const float log_tail = log_tail_mass[n];
"""

WEIGHTS = """
    for (uint i = tid; i < k; i += threads) {
        const float w = weights[size_t(n) * k + i];
        kept[i] = row_ids[i] < vocab && w > 0.0f ? w : 0.0f;
    }
"""

EMPTY_TABLE = """
    for (uint i = tid; i < slots; i += threads) {
        metal::atomic_store_explicit(&table[i], NOBODY, metal::memory_order_relaxed);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
"""

FORWARD = """
    if (EXCLUDES) {
        for (uint i = tid; i < k; i += threads) {
            if (kept[i] > 0.0f) {
                insert(table, slots, row_ids[i]);
            }
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
    }

    Normaliser part_t = {NEGATIVE_INFINITY, 0.0f};
    Normaliser part = {NEGATIVE_INFINITY, 0.0f};
    for (uint first = tid * PER_THREAD; first < vocab; first += threads * PER_THREAD) {
        float z[PER_THREAD];
        float s[PER_THREAD];
        for (uint i = 0; i < PER_THREAD; i++) {
            const uint v = first + i;
            z[i] = v < vocab ? final_of(float(row[long(v) * step])) : NEGATIVE_INFINITY;
            s[i] = EXCLUDES && v < vocab && holds(table, slots, v) ? NEGATIVE_INFINITY : z[i] / temperature;
        }
        include<PER_THREAD>(part_t, s);
        if (tempered) {
            include<PER_THREAD>(part, z);
        }
    }
    const float lse_rest = group_log(part_t, parts, at);
    float lse_kept = NEGATIVE_INFINITY;
    if (EXCLUDES) {
        Normaliser part_kept = {NEGATIVE_INFINITY, 0.0f};
        for (uint i = tid; i < k; i += threads) {
            if (kept[i] > 0.0f) {
                const float s = final_of(float(row[long(row_ids[i]) * step])) / temperature;
                include<1>(part_kept, &s);
            }
        }
        lse_kept = group_log(part_kept, parts, at);
    }
    const float lse_t = log_add(lse_rest, lse_kept);
    const float lse = tempered ? group_log(part, parts, at) : lse_t;

    float loss = 0.0f;
    float total = 0.0f;
    {
VALUE
    }
    if (tid == 0) {
        kd[n] = row_weight * loss;
        ce[n] = label < vocab ? row_weight * (lse - final_of(float(row[long(label) * step]))) : 0.0f;
        saved[size_t(n) * 4] = lse;
        saved[size_t(n) * 4 + 1] = lse_kept;
        saved[size_t(n) * 4 + 2] = lse_rest;
        saved[size_t(n) * 4 + 3] = total;
    }
"""

BACKWARD = """
    const float lse = saved[size_t(n) * 4];
    const float lse_kept = saved[size_t(n) * 4 + 1];
    const float lse_rest = saved[size_t(n) * 4 + 2];
    const float lse_t = log_add(lse_rest, lse_kept);
    const float total = saved[size_t(n) * 4 + 3];
    float coefficient = 0.0f;
    float normaliser = lse_t;
    {
GRADIENT
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    const float shift = finite_or_zero(normaliser);
    const float share = metal::precise::exp(normaliser - lse);
    for (uint first = tid * PER_THREAD; first < width; first += threads * PER_THREAD) {
        for (uint v = first; v < metal::min(first + PER_THREAD, width); v++) {
            if (v >= vocab) {
                into[v] = T(0.0f);
                continue;
            }
            const float z = final_of(float(row[long(v) * step]));
            float dz = 0.0f;
            bool is_kept = false;
            for (uint slot = slot_of(v, slots);; slot = (slot + 1) & (slots - 1)) {
                const int found = id_at(table, slot);
                if (found == NOBODY) {
                    break;
                }
                if (found == int(v)) {
                    dz += added[slot];
                    is_kept = true;
                }
            }
            const bool replaced = EXCLUDES && is_kept;
            const float e = replaced ? 0.0f : metal::precise::exp(z / temperature - shift);
            dz += coefficient * e;
            if (b != 0.0f) {
                dz += b * (tempered || replaced ? metal::precise::exp(z - lse) : share * e);
                dz -= v == label ? b : 0.0f;
            }
            into[v] = T(dz * final_of.slope(z));
        }
    }
"""

CELLS = """
    const uint head = uint(head_count[n]);
    float sum = 0.0f;
    float most = 0.0f;
    for (uint i = tid; i < k; i += threads) {
        const uint code = uint(codes[size_t(n) * k + i]);
        const float p = i < head && code != LARGEST ? prob_of(code) : 0.0f;
        kept[i] = p;
        sum += p;
        most = metal::max(most, p);
    }
    const uint tail_code = uint(tail[n]);
    float tail_mass = tail_code == LARGEST ? 0.0f : prob_of(tail_code);
    float rest = 1.0f - (group_sum(sum, parts, at) + tail_mass);
    most = metal::max(group_max(most, parts, at), tail_mass);
    // Hundreds of equal cells may leave the largest too little; it is then as large as the next, and all are scaled.
    float whole_mass = 1.0f;
    if (rest < most / 2.0f) {
        whole_mass = 1.0f - rest + most;
        rest = most / whole_mass;
    }
    tail_mass = tail_code == LARGEST ? rest : tail_mass / whole_mass;
    const float log_tail = metal::precise::log(tail_mass);
    const float each = SAMPLED ? tail_mass / float(metal::max(k - head, 1u)) : 0.0f;
    for (uint i = tid; i < k; i += threads) {
        const bool is_largest = uint(codes[size_t(n) * k + i]) == LARGEST;
        const float p = i >= head ? each : is_largest ? rest : kept[i] / whole_mass;
        kept[i] = row_ids[i] < vocab ? p : 0.0f;
    }
"""

DRAWS = """
    const uint head = uint(head_count[n]);
    const float log_tail = NEGATIVE_INFINITY;
    for (uint i = tid; i < k; i += threads) {
        const uint code = uint(codes[size_t(n) * k + i]);
        const float w = COUNTS ? float(code) / float(k) : DRAWS_WEIGHT * prob_of(code);
        kept[i] = i < head && row_ids[i] < vocab ? w : 0.0f;
    }
"""

CODES = f"""
constant constexpr uint LARGEST = {LARGEST};
constant constexpr uint ZERO = {ZERO};
constant constexpr float STEPS_PER_NAT = {float(STEPS_PER_NAT)}f;
constant constexpr float DRAWS_WEIGHT = {DRAWS_WEIGHT!r}f;

inline float prob_of(uint code) {{
    return code == ZERO ? 0.0f : metal::precise::exp(float(code) / -STEPS_PER_NAT);
}}
"""
