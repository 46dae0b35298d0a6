// Runs one Metal kernel launch on one thread of the CPU and watches every load and store of it.
//
// A GPU thread is a fiber; 32 of them are a simdgroup. The kernel is compiled with -fsanitize=thread, whose calls
// (__tsan_read4 and so on) arrive here instead of in libtsan: that is how each access is seen, with its address.
// Buffers live in equal slots of one reserved address range, so that an address tells its slot by a shift; slot 0
// holds the threadgroup arrays. Guards around each buffer are mapped too: an access there is reported and harmless.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <random>
#include <vector>

#include <csignal>
#include <link.h>
#include <sys/mman.h>
#include <ucontext.h>

#include "metal_shared.h"

#define EXPORT extern "C" __attribute__((visibility("default")))
#define RETURN_ADDRESS reinterpret_cast<uintptr_t>(__builtin_return_address(0))

namespace {

constexpr int kMaxThreads = 1024;
constexpr int kFrames = 32;
constexpr int kMaxDefects = 512;
constexpr size_t kStackBytes = 256 << 10;
constexpr int kBlockShift = 20;  // a threadgroup array has a block of its own in slot 0, and starts in its middle
constexpr size_t kBlockStart = size_t(1) << (kBlockShift - 1);

enum Kind : int {
    kDivergentBarrier, kDivergentSimd, kReadOutside, kWriteOutside, kUninitialised, kRace, kWriteConst, kSharedTooLarge,
    kDivision,
};
enum Status : int { kReady, kAtSimd, kAtBarrier, kDone };
enum Schedule : int { kAscending, kDescending, kRandom };

struct Site {
    uintptr_t pc = 0;         // the access or call itself
    uintptr_t kernel_pc = 0;  // the same, or the call in the kernel's body that led to it
    bool operator==(const Site &o) const { return pc == o.pc && kernel_pc == o.kernel_pc; }
};

// Read by ctypes: report.py has the same fields.
struct Defect {
    int32_t kind, slot, size, operation, group[3], thread, other_thread, present, expected, is_write;
    int64_t offset;
    uint64_t count, pc, kernel_pc, other_pc, other_kernel_pc;
};

struct Slot {
    uintptr_t begin, end;
    uint64_t loaded, stored;
    bool read_only;
};

struct Trace {
    uint32_t epoch = 0;
    uint16_t thread = 0;
    bool atomic = false;
    Site site;
};

struct Shadow {  // of one byte of a threadgroup array
    Trace write, read, other_read;  // `other_read` is by another simdgroup than `read`, in the same epoch
};

struct SharedArray {
    size_t bytes = 0;
    std::vector<Shadow> shadow;
};

struct Fiber {
    Status status;
    int operation, flags, depth, atomics;
    uint8_t size;
    bool yielded;
    Site site;
    uintptr_t frames[kFrames];
    alignas(16) unsigned char value[16];
#if defined(__x86_64__) || defined(__aarch64__)
    void *stack_pointer;
#else
    ucontext_t context;
#endif
};

struct Arena {
    uintptr_t base;
    size_t bytes;
    int shift;
    std::vector<Slot> slots;
};

// One launch at a time: Python holds a lock.
uintptr_t arena_base, arena_bytes, pool_base, pool_bytes, image_begin, image_end;
int arena_shift;
Slot *slots;
std::vector<SharedArray> shared_arrays;
std::vector<Defect> defects;
Fiber fibers[kMaxThreads];
Fiber *current;
int schedule, thread_count;
uint32_t epoch;        // grows at each barrier that orders threadgroup memory, and at each threadgroup
uint32_t first_epoch;  // of this threadgroup: older traces are another threadgroup's
int32_t group_position[3];
bool stopped_a_thread;
std::mt19937_64 random_bits;
uint64_t coin_bits;
void (*entry_point)(void *const *, const emulator_ids *);
void *const *entry_buffers;

struct Pool {  // what fibers may touch beside the arena: stacks, exchange areas, positions, pointers
    emulator_exchange exchange[kMaxThreads / 32];
    emulator_ids ids[kMaxThreads];
    void *buffers[256];
};
Pool *pool;

// ---------------------------------------------------------------- fibers

#if defined(__x86_64__)
extern "C" void emulator_switch(void **save, void *load);
asm(R"(
.text
.hidden emulator_switch
.globl emulator_switch
.type emulator_switch, @function
emulator_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size emulator_switch, .-emulator_switch
)");
void *scheduler_stack;
#elif defined(__aarch64__)
extern "C" void emulator_switch(void **save, void *load);
asm(R"(
.text
.hidden emulator_switch
.globl emulator_switch
.type emulator_switch, %function
emulator_switch:
    sub sp, sp, #160
    stp x19, x20, [sp]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x9, sp
    str x9, [x0]
    mov sp, x1
    ldp x19, x20, [sp]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
.size emulator_switch, .-emulator_switch
)");
void *scheduler_stack;
#else
ucontext_t scheduler_context;
#endif

int index_of(const Fiber *fiber) { return int(fiber - fibers); }

void leave() {
#if defined(__x86_64__) || defined(__aarch64__)
    emulator_switch(&current->stack_pointer, scheduler_stack);
#else
    swapcontext(&current->context, &scheduler_context);
#endif
}

void resume(Fiber *fiber) {
    current = fiber;
#if defined(__x86_64__) || defined(__aarch64__)
    emulator_switch(&scheduler_stack, fiber->stack_pointer);
#else
    swapcontext(&scheduler_context, &fiber->context);
#endif
    current = nullptr;
}

void fiber_main() {
    entry_point(entry_buffers, &pool->ids[index_of(current)]);
    current->status = kDone;
    leave();
}

void start(Fiber *fiber) {
    fiber->status = kReady;
    fiber->depth = fiber->atomics = 0;
    fiber->yielded = false;
    int index = index_of(fiber);
    // Tops are staggered: at equal offsets in their pages all stacks would fight for the same cache lines.
    uintptr_t stack = pool_base + sizeof(Pool) + size_t(index) * kStackBytes;
    uintptr_t top = (stack + kStackBytes - (size_t(index) * 320) % 8192) & ~uintptr_t(63);
#if defined(__x86_64__)
    auto words = reinterpret_cast<uintptr_t *>(top);
    words[-1] = 0;
    words[-2] = reinterpret_cast<uintptr_t>(&fiber_main);
    std::memset(words - 8, 0, 6 * sizeof(uintptr_t));
    fiber->stack_pointer = words - 8;
#elif defined(__aarch64__)
    auto words = reinterpret_cast<uintptr_t *>(top - 160);
    std::memset(words, 0, 160);
    words[11] = reinterpret_cast<uintptr_t>(&fiber_main);
    fiber->stack_pointer = words;
#else
    getcontext(&fiber->context);
    fiber->context.uc_stack.ss_sp = reinterpret_cast<void *>(stack);
    fiber->context.uc_stack.ss_size = top - stack;
    fiber->context.uc_link = nullptr;
    makecontext(&fiber->context, fiber_main, 0);
#endif
}

// ---------------------------------------------------------------- defects

Site site_of(uintptr_t pc) {
    // frames: [0] the scheduler's call of the entry, [1] the entry's of the kernel, [2] the kernel's of a helper
    return {pc, current->depth > 2 ? current->frames[2] : pc};
}

Defect *report(Kind kind, const Site &site, const Site &other = {}) {
    for (auto &known : defects) {
        if (known.kind == kind && known.pc == site.pc && known.kernel_pc == site.kernel_pc &&
            (kind != kRace || (known.other_pc == other.pc && known.other_kernel_pc == other.kernel_pc))) {
            known.count++;
            return nullptr;
        }
    }
    if (defects.size() >= kMaxDefects) return nullptr;
    Defect defect{};
    defect.kind = kind;
    defect.count = 1;
    defect.thread = current ? index_of(current) : -1;
    defect.other_thread = -1;
    std::copy(group_position, group_position + 3, defect.group);
    defect.pc = site.pc;
    defect.kernel_pc = site.kernel_pc;
    defect.other_pc = other.pc;
    defect.other_kernel_pc = other.kernel_pc;
    defects.push_back(defect);
    return &defects.back();
}

__attribute__((noinline)) void report_outside(int slot, int64_t offset, size_t size, bool write, uintptr_t pc) {
    if (Defect *defect = report(write ? kWriteOutside : kReadOutside, site_of(pc))) {
        defect->slot = slot;
        defect->offset = offset;
        defect->size = int32_t(size);
    }
}

// ---------------------------------------------------------------- memory

bool coin(int bits) {
    if (coin_bits < 256) coin_bits = random_bits();
    bool heads = (coin_bits & ((1u << bits) - 1)) == 0;
    coin_bits >>= bits;
    return heads;
}

void yield() {
    current->yielded = true;
    leave();
}

void race(const Trace &earlier, bool earlier_writes, bool now_writes, int array, size_t offset, size_t size,
          const Site &site) {
    if (Defect *defect = report(kRace, site, earlier.site)) {
        defect->slot = -1 - array;
        defect->offset = int64_t(offset);
        defect->size = int32_t(size);
        defect->other_thread = earlier.thread;
        defect->is_write = (now_writes ? 1 : 0) | (earlier_writes ? 2 : 0);
    }
}

__attribute__((noinline)) void touch_shared(uintptr_t offset, size_t size, bool read, bool write, bool atomic,
                                            uintptr_t pc) {
    if (schedule == kRandom && !atomic && coin(4)) yield();
    int array = int(offset >> kBlockShift);
    int64_t start = int64_t(offset & ((size_t(1) << kBlockShift) - 1)) - int64_t(kBlockStart);
    if (array >= int(shared_arrays.size()) || start < 0 || start + size > shared_arrays[array].bytes) {
        report_outside(array < int(shared_arrays.size()) ? -1 - array : -1, start, size, write, pc);
        return;
    }
    Site site = site_of(pc);
    auto thread = uint16_t(index_of(current));
    int simdgroup = thread / 32;
    Shadow *shadow = &shared_arrays[array].shadow[size_t(start)];
    bool reported = false;
    for (size_t i = 0; i < size; i++, shadow++) {
        if (read && !reported && shadow->write.epoch < first_epoch) {
            reported = true;
            if (Defect *defect = report(kUninitialised, site)) {
                defect->slot = -1 - array;
                defect->offset = start;
                defect->size = int32_t(size);
            }
        }
        const Trace &last = shadow->write;
        if (!reported && last.epoch == epoch && last.thread / 32 != simdgroup && !(atomic && last.atomic)) {
            reported = true;
            race(last, true, write, array, size_t(start), size, site);
        }
        if (write && !reported) {
            for (const Trace *earlier : {&shadow->read, &shadow->other_read}) {
                if (earlier->epoch == epoch && earlier->thread / 32 != simdgroup && !(atomic && earlier->atomic)) {
                    reported = true;
                    race(*earlier, false, true, array, size_t(start), size, site);
                    break;
                }
            }
        }
        if (read) {
            Trace &first = shadow->read;
            if (first.epoch != epoch || (first.thread / 32 == simdgroup && first.atomic && !atomic)) {
                if (first.epoch != epoch) shadow->other_read.epoch = 0;
                first = {epoch, thread, atomic, site};
            } else if (first.thread / 32 != simdgroup) {
                Trace &second = shadow->other_read;
                if (second.epoch != epoch || (second.atomic && !atomic)) second = {epoch, thread, atomic, site};
            }
        }
        if (write) shadow->write = {epoch, thread, atomic, site};
    }
}

__attribute__((noinline)) void touch_elsewhere(uintptr_t address, size_t size, bool write, uintptr_t pc) {
    if (address >= image_begin && address + size <= image_end) return;  // the kernel's own constants
    report_outside(INT32_MIN, int64_t(address), size, write, pc);
    stopped_a_thread = true;  // the access would end the process
    current->status = kDone;
    leave();
}

// An integer division by zero gives some value on a GPU and a signal on x86: the thread is stopped instead.
void on_division(int, siginfo_t *, void *context) {
    uintptr_t pc = 0;
#if defined(__x86_64__)
    pc = uintptr_t(static_cast<ucontext_t *>(context)->uc_mcontext.gregs[REG_RIP]) + 1;
#endif
    if (!current || !pc) {
        std::signal(SIGFPE, SIG_DFL);
        return;
    }
    report(kDivision, site_of(pc));
    stopped_a_thread = true;
    current->status = kDone;
    leave();
}

struct DivisionGuard {
    struct sigaction before;
    DivisionGuard() {
        struct sigaction action {};
        action.sa_sigaction = on_division;
        action.sa_flags = SA_SIGINFO | SA_NODEFER;
        sigaction(SIGFPE, &action, &before);
    }
    ~DivisionGuard() { sigaction(SIGFPE, &before, nullptr); }
};

inline void touch(uintptr_t address, size_t size, bool read, bool write, bool atomic, uintptr_t pc) {
    if (__builtin_expect(current == nullptr, 0)) return;
    uintptr_t offset = address - arena_base;
    if (offset >= arena_bytes) {
        if (address - pool_base >= pool_bytes) touch_elsewhere(address, size, write, pc);
        return;
    }
    uintptr_t index = offset >> arena_shift;
    if (index == 0) {
        touch_shared(offset, size, read, write, atomic, pc);
        return;
    }
    Slot &slot = slots[index];
    if (__builtin_expect(address < slot.begin || address + size > slot.end, 0)) {
        report_outside(int(index), int64_t(address - slot.begin), size, write, pc);
        return;
    }
    if (read) slot.loaded += size;
    if (write) {
        slot.stored += size;
        if (__builtin_expect(slot.read_only, 0)) {
            if (Defect *defect = report(kWriteConst, site_of(pc))) {
                defect->slot = int(index);
                defect->offset = int64_t(address - slot.begin);
                defect->size = int32_t(size);
            }
        }
    }
}

}  // namespace

// ---------------------------------------------------------------- what the compiler's instrumentation calls

#define HOOK(name, bytes, read, write)                                                                                 \
    EXPORT void name##bytes(void *p) { touch(uintptr_t(p), bytes, read, write, false, RETURN_ADDRESS); }
#define ACCESS(bytes)                                                                                                  \
    HOOK(__tsan_read, bytes, true, false)                                                                              \
    HOOK(__tsan_write, bytes, false, true)                                                                             \
    HOOK(__tsan_unaligned_read, bytes, true, false)                                                                    \
    HOOK(__tsan_unaligned_write, bytes, false, true)                                                                   \
    HOOK(__tsan_volatile_read, bytes, true, false)                                                                     \
    HOOK(__tsan_volatile_write, bytes, false, true)
ACCESS(1)
ACCESS(2)
ACCESS(4)
ACCESS(8)
ACCESS(16)

EXPORT void __tsan_read_range(void *p, size_t n) { touch(uintptr_t(p), n, true, false, false, RETURN_ADDRESS); }
EXPORT void __tsan_write_range(void *p, size_t n) { touch(uintptr_t(p), n, false, true, false, RETURN_ADDRESS); }
EXPORT void __tsan_vptr_update(void *, void *) {}
EXPORT void __tsan_vptr_read(void *) {}
EXPORT void __tsan_init() {}
EXPORT void __tsan_func_entry(void *caller) {
    if (current && current->depth++ < kFrames) current->frames[current->depth - 1] = uintptr_t(caller);
}
EXPORT void __tsan_func_exit(void *) {
    if (current) current->depth--;
}

// ---------------------------------------------------------------- what the Metal library of metal_shim.h calls

EXPORT void emulator_atomic(void *p, size_t size, int read, int write) {
    if (!current) return;
    // A kernel may spin on an atomic until another thread changes it: let the others run now and then.
    if (++current->atomics % 64 == 0 || (schedule == kRandom && coin(4))) yield();
    touch(uintptr_t(p), size, read != 0, write != 0, true, RETURN_ADDRESS);
}

EXPORT void *emulator_shared(int array, size_t bytes) {
    if (array >= int(shared_arrays.size())) shared_arrays.resize(array + 1);
    SharedArray &shared = shared_arrays[array];
    auto start = reinterpret_cast<void *>(arena_base + (size_t(array) << kBlockShift) + kBlockStart);
    if (shared.bytes != bytes) {
        shared.bytes = bytes;
        shared.shadow.assign(bytes, {});
        std::memset(start, 0xff, bytes);
        size_t total = 0;
        for (const auto &each : shared_arrays) total += each.bytes;
        if (total > 32768) {
            if (Defect *defect = report(kSharedTooLarge, site_of(RETURN_ADDRESS))) defect->offset = int64_t(total);
        }
    }
    return start;
}

EXPORT const emulator_exchange *emulator_simd(int operation, const void *value, size_t size) {
    current->operation = operation;
    current->size = uint8_t(size);
    std::memcpy(current->value, value, size);
    current->site = site_of(RETURN_ADDRESS);
    current->status = kAtSimd;
    leave();
    return &pool->exchange[index_of(current) / 32];
}

EXPORT unsigned emulator_lane() { return unsigned(index_of(current)) % 32; }

EXPORT void emulator_barrier(int flags) {
    current->flags = flags;
    current->site = site_of(RETURN_ADDRESS);
    current->status = kAtBarrier;
    leave();
}

// ---------------------------------------------------------------- the scheduler

namespace {

bool has_ready(int simdgroup) {
    for (int i = simdgroup * 32; i < std::min(simdgroup * 32 + 32, thread_count); i++) {
        if (fibers[i].status == kReady) return true;
    }
    return false;
}

// Runs each lane that can run; in a random schedule a lane that gave way ends the turn.
void run_lanes(int simdgroup) {
    int begin = simdgroup * 32, count = std::min(32, thread_count - begin);
    int first = schedule == kRandom ? int(random_bits() % unsigned(count)) : 0;
    for (int i = 0; i < count; i++) {
        int lane = schedule == kDescending ? count - 1 - i : (first + i) % count;
        Fiber *fiber = &fibers[begin + lane];
        if (fiber->status != kReady) continue;
        fiber->yielded = false;
        resume(fiber);
        if (fiber->yielded && schedule == kRandom) return;
    }
}

// The threads of [begin, end) with this status at the site that comes first in the code, and how many they are.
int earliest(int begin, int end, Status status, int *operation, Site *site) {
    const Fiber *first = nullptr;
    int present = 0;
    for (int i = begin; i < end; i++) {
        const Fiber &fiber = fibers[i];
        if (fiber.status != status) continue;
        bool same = first && fiber.site == first->site && fiber.operation == first->operation;
        if (same) {
            present++;
        } else if (!first || fiber.site.kernel_pc < first->site.kernel_pc ||
                   (fiber.site.kernel_pc == first->site.kernel_pc && fiber.site.pc < first->site.pc)) {
            first = &fiber;
            present = 1;
        }
    }
    if (first) {
        *site = first->site;
        *operation = first->operation;
    }
    return present;
}

void report_divergence(Kind kind, int begin, int end, Status status, int operation, const Site &site, int present) {
    if (stopped_a_thread) return;
    Site other;
    int other_thread = -1, thread = -1;
    for (int i = begin; i < end; i++) {
        const Fiber &fiber = fibers[i];
        bool here = fiber.status == status && fiber.site == site && fiber.operation == operation;
        if (here && thread < 0) thread = i;
        // One that waits elsewhere says more than one that has finished.
        if (!here && (other_thread < 0 || (!other.pc && fiber.status != kDone))) {
            other_thread = i;
            if (fiber.status != kDone) other = fiber.site;
        }
    }
    if (Defect *defect = report(kind, site, other)) {
        defect->operation = operation;
        defect->present = present;
        defect->expected = end - begin;
        defect->thread = thread;
        defect->other_thread = other_thread;
    }
}

// Completes the simd operation that the simdgroup's lanes wait at; false if none does.
bool complete_simd(int simdgroup) {
    int begin = simdgroup * 32, end = std::min(begin + 32, thread_count), operation = 0;
    Site site;
    int present = earliest(begin, end, kAtSimd, &operation, &site);
    if (present == 0) return false;
    if (present != end - begin && operation < emulator_quiet_operations) {
        report_divergence(kDivergentSimd, begin, end, kAtSimd, operation, site, present);
    }
    emulator_exchange &exchange = pool->exchange[simdgroup];
    exchange.active = 0;
    std::memset(exchange.values, 0xff, sizeof exchange.values);
    for (int i = begin; i < end; i++) {
        Fiber &fiber = fibers[i];
        if (fiber.status != kAtSimd || !(fiber.site == site) || fiber.operation != operation) continue;
        exchange.active |= 1u << (i - begin);
        std::memcpy(exchange.values[i - begin], fiber.value, fiber.size);
        fiber.status = kReady;
    }
    return true;
}

// Opens the threadgroup barrier that comes first in the code; false if no thread waits.
bool complete_barrier() {
    int operation = 0;
    Site site;
    for (int i = 0; i < thread_count; i++) {
        if (fibers[i].status == kAtBarrier) fibers[i].operation = emulator_barrier_operation;
    }
    int present = earliest(0, thread_count, kAtBarrier, &operation, &site);
    if (present == 0) return false;
    if (present != thread_count) {
        report_divergence(kDivergentBarrier, 0, thread_count, kAtBarrier, operation, site, present);
    }
    bool orders = true;
    for (int i = 0; i < thread_count; i++) {
        Fiber &fiber = fibers[i];
        if (fiber.status != kAtBarrier || !(fiber.site == site)) continue;
        orders = orders && (fiber.flags & emulator_mem_threadgroup);
        fiber.status = kReady;
    }
    if (orders) epoch++;
    return true;
}

void run_threads() {
    int count = (thread_count + 31) / 32, next = schedule == kDescending ? count - 1 : 0;
    int step = schedule == kDescending ? count - 1 : 1;
    while (true) {
        if (schedule == kRandom) next = int(random_bits() % unsigned(count));
        int tried = 0;
        while (tried < count && !has_ready(next)) {
            next = (next + step) % count;
            tried++;
        }
        if (tried < count) {
            run_lanes(next);
            bool again = !has_ready(next) && complete_simd(next);
            if (!again && schedule != kRandom) next = (next + step) % count;
            continue;
        }
        if (!complete_barrier()) return;
        next = schedule == kDescending ? count - 1 : 0;
    }
}

void run_group(const uint64_t *grid, const uint32_t *group, const uint32_t *position) {
    uint32_t size[3], groups[3];
    for (int k = 0; k < 3; k++) {
        groups[k] = uint32_t((grid[k] + group[k] - 1) / group[k]);
        size[k] = uint32_t(std::min<uint64_t>(group[k], grid[k] - uint64_t(position[k]) * group[k]));
        group_position[k] = int32_t(position[k]);
    }
    thread_count = int(size[0] * size[1] * size[2]);
    stopped_a_thread = false;
    first_epoch = ++epoch;
    for (size_t i = 0; i < shared_arrays.size(); i++) {
        auto start = reinterpret_cast<void *>(arena_base + (i << kBlockShift) + kBlockStart);
        std::memset(start, 0xff, shared_arrays[i].bytes);
    }
    for (int i = 0; i < thread_count; i++) {
        auto index = uint32_t(i);
        uint32_t inside[3] = {index % size[0], index / size[0] % size[1], index / (size[0] * size[1])};
        emulator_ids &ids = pool->ids[i];
        for (int k = 0; k < 3; k++) {
            ids.thread_position_in_threadgroup[k] = inside[k];
            ids.threadgroup_position_in_grid[k] = position[k];
            ids.thread_position_in_grid[k] = position[k] * group[k] + inside[k];
            ids.threads_per_threadgroup[k] = size[k];
            ids.dispatch_threads_per_threadgroup[k] = group[k];
            ids.threadgroups_per_grid[k] = groups[k];
            ids.threads_per_grid[k] = ids.grid_size[k] = uint32_t(grid[k]);
            ids.grid_origin[k] = 0;
        }
        uint32_t full = group[0] * group[1] * group[2];
        ids.thread_index_in_threadgroup = index;
        ids.thread_index_in_simdgroup = index % 32;
        ids.simdgroup_index_in_threadgroup = index / 32;
        ids.thread_index_in_quadgroup = index % 4;
        ids.quadgroup_index_in_threadgroup = index / 4;
        ids.simdgroups_per_threadgroup = uint32_t(thread_count + 31) / 32;
        ids.quadgroups_per_threadgroup = uint32_t(thread_count + 3) / 4;
        ids.dispatch_simdgroups_per_threadgroup = (full + 31) / 32;
        ids.dispatch_quadgroups_per_threadgroup = (full + 3) / 4;
        ids.threads_per_simdgroup = ids.thread_execution_width = 32;
        start(&fibers[i]);
    }
    run_threads();
}

void *reserve(size_t bytes) {
    void *start = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (start == MAP_FAILED) return nullptr;
    madvise(start, bytes, MADV_NOHUGEPAGE);
    return start;
}

}  // namespace

// ---------------------------------------------------------------- what Python calls

EXPORT Arena *emulator_open(int buffers, const uint64_t *bytes) {
    uint64_t largest = 0;
    for (int i = 0; i < buffers; i++) largest = std::max(largest, bytes[i]);
    // Guards of up to 32 GiB cost nothing but addresses; where addresses are limited, smaller ones must do.
    for (int guard_shift = 35; guard_shift >= 20; guard_shift--) {
        uint64_t need = largest + (uint64_t(2) << guard_shift);
        int shift = 27;  // slot 0 holds up to 128 threadgroup arrays
        while ((uint64_t(1) << shift) < need) shift++;
        size_t total = size_t(buffers + 1) << shift;
        void *start = reserve(total);
        if (!start) continue;
        auto arena = new Arena{uintptr_t(start), total, shift, std::vector<Slot>(size_t(buffers) + 1)};
        for (int i = 0; i < buffers; i++) {
            uintptr_t begin = arena->base + (uintptr_t(i + 1) << shift) + (uintptr_t(1) << guard_shift);
            arena->slots[i + 1] = {begin, begin + bytes[i], 0, 0, true};
        }
        return arena;
    }
    return nullptr;
}

EXPORT void emulator_close(Arena *arena) {
    munmap(reinterpret_cast<void *>(arena->base), arena->bytes);
    delete arena;
}

EXPORT void *emulator_slot(Arena *arena, int buffer) {
    return reinterpret_cast<void *>(arena->slots[buffer + 1].begin);
}

EXPORT void emulator_writable(Arena *arena, int buffer) { arena->slots[buffer + 1].read_only = false; }

EXPORT void emulator_counts(Arena *arena, int buffer, uint64_t *loaded, uint64_t *stored) {
    *loaded = arena->slots[buffer + 1].loaded;
    *stored = arena->slots[buffer + 1].stored;
}

// Runs the launch, or the threadgroups listed; returns how many defects there are, or -1 without memory for stacks.
EXPORT int emulator_run(Arena *arena, void *entry, void **buffers, int buffer_count, const uint64_t *grid,
                        const uint32_t *group, const uint32_t *positions, uint64_t position_count, int order,
                        uint64_t seed) {
    if (!pool) {
        size_t bytes = sizeof(Pool) + kMaxThreads * kStackBytes;
        pool = static_cast<Pool *>(reserve(bytes));
        if (!pool) return -1;
        pool_base = uintptr_t(pool);
        pool_bytes = bytes;
    }
    std::copy(buffers, buffers + buffer_count, pool->buffers);
    entry_buffers = pool->buffers;
    entry_point = reinterpret_cast<void (*)(void *const *, const emulator_ids *)>(entry);
    arena_base = arena->base;
    arena_bytes = arena->bytes;
    arena_shift = arena->shift;
    slots = arena->slots.data();
    shared_arrays.clear();
    defects.clear();
    epoch = 0;
    schedule = order;
    random_bits.seed(seed);
    coin_bits = 0;

    image_begin = image_end = uintptr_t(entry);
    auto find_image = [](dl_phdr_info *info, size_t, void *) -> int {
        uintptr_t begin = UINTPTR_MAX, end = 0;
        for (int i = 0; i < info->dlpi_phnum; i++) {
            if (info->dlpi_phdr[i].p_type != PT_LOAD) continue;
            uintptr_t start = info->dlpi_addr + info->dlpi_phdr[i].p_vaddr;
            begin = std::min(begin, start);
            end = std::max(end, start + info->dlpi_phdr[i].p_memsz);
        }
        if (image_begin < begin || image_begin >= end) return 0;
        image_begin = begin;
        image_end = end;
        return 1;
    };
    dl_iterate_phdr(find_image, nullptr);

    DivisionGuard guard;
    uint64_t across[3], total = 1;
    for (int k = 0; k < 3; k++) {
        across[k] = (grid[k] + group[k] - 1) / group[k];
        total *= across[k];
    }
    if (positions) total = position_count;
    std::vector<uint64_t> shuffled;
    if (schedule == kRandom && total <= (1u << 20)) {
        shuffled.resize(total);
        for (uint64_t i = 0; i < total; i++) shuffled[i] = i;
        std::shuffle(shuffled.begin(), shuffled.end(), random_bits);
    }
    for (uint64_t i = 0; i < total; i++) {
        uint64_t index = schedule == kDescending ? total - 1 - i : shuffled.empty() ? i : shuffled[i];
        uint32_t position[3];
        if (positions) {
            std::copy(positions + 3 * index, positions + 3 * index + 3, position);
        } else {
            position[0] = uint32_t(index % across[0]);
            position[1] = uint32_t(index / across[0] % across[1]);
            position[2] = uint32_t(index / (across[0] * across[1]));
        }
        run_group(grid, group, position);
    }
    return int(defects.size());
}

EXPORT const Defect *emulator_defects() { return defects.data(); }
EXPORT uint64_t emulator_image() { return image_begin; }
EXPORT uint64_t emulator_shared_bytes() {
    uint64_t total = 0;
    for (const auto &shared : shared_arrays) total += shared.bytes;
    return total;
}
