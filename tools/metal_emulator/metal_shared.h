// What the runtime and the compiled kernel agree on.
#pragma once

#include <cstddef>
#include <cstdint>

struct emulator_ids {
    uint32_t thread_position_in_grid[3], thread_position_in_threadgroup[3], threadgroup_position_in_grid[3];
    uint32_t threads_per_threadgroup[3], dispatch_threads_per_threadgroup[3], threadgroups_per_grid[3];
    uint32_t threads_per_grid[3], grid_size[3], grid_origin[3];
    uint32_t thread_index_in_threadgroup, thread_index_in_simdgroup, simdgroup_index_in_threadgroup;
    uint32_t thread_index_in_quadgroup, quadgroup_index_in_threadgroup, simdgroups_per_threadgroup;
    uint32_t quadgroups_per_threadgroup, dispatch_simdgroups_per_threadgroup, dispatch_quadgroups_per_threadgroup;
    uint32_t threads_per_simdgroup, thread_execution_width;
};

// The values that the lanes of a simdgroup brought to a simd operation; 0xff where a lane brought none.
struct emulator_exchange {
    uint32_t active;
    alignas(16) unsigned char values[32][16];
};

// Operations by number: report.py has the same list. From emulator_quiet_operations on, divergence is no defect.
enum emulator_operation : int {
    op_sum, op_product, op_max, op_min, op_and, op_or, op_xor, op_any, op_all, op_ballot, op_broadcast,
    op_broadcast_first, op_shuffle, op_shuffle_up, op_shuffle_down, op_shuffle_xor, op_prefix_inclusive_sum,
    op_prefix_exclusive_sum, op_prefix_inclusive_product, op_prefix_exclusive_product, op_simdgroup_barrier,
    emulator_barrier_operation, emulator_quiet_operations, op_is_first = emulator_quiet_operations, op_active,
};

constexpr int emulator_mem_device = 1, emulator_mem_threadgroup = 2, emulator_mem_texture = 4;

extern "C" {
void emulator_atomic(void *address, size_t bytes, int read, int write);
void *emulator_shared(int array, size_t bytes);
const emulator_exchange *emulator_simd(int operation, const void *value, size_t bytes);
unsigned emulator_lane();
void emulator_barrier(int flags);
}
