// Metal as far as the kernels use it, in C++ for OpenCL: declarations only, nothing of this runs.
#pragma OPENCL EXTENSION cl_khr_fp16 : enable
#define device __global
#define constant __constant
#define thread __private
#define threadgroup __local
#define NAN __builtin_nanf("")

typedef unsigned char uchar;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef uchar uint8_t;
typedef int int32_t;
typedef uint uint32_t;
typedef long int64_t;
typedef ulong size_t;
typedef uint uint3 __attribute__((ext_vector_type(3)));
typedef half float16_t;

struct bfloat16_t {
    explicit bfloat16_t(float);
    explicit operator float() const;
    explicit operator float() const device;
    explicit operator float() const constant;
};

template <typename To, typename From>
To as_type(From);
float log1p(float);  // MLX's own

namespace metal {
template <typename T>
struct numeric_limits {
    static constexpr T infinity() {
        return __builtin_inff();
    }
};

uint min(uint, uint);
uint max(uint, uint);
uint clz(uint);
float min(float, float);
float max(float, float);
float abs(float);
bool isinf(float);
bool isnan(float);
bool isfinite(float);

namespace precise {
float exp(float);
float log(float);
float tanh(float);
}  // namespace precise

enum memory_order { memory_order_relaxed };
template <typename T>
struct atomic {
    T value;
};
typedef atomic<int> atomic_int;
typedef atomic<uint> atomic_uint;

template <typename T>
void atomic_store_explicit(volatile threadgroup atomic<T>*, T, memory_order);
template <typename T>
T atomic_load_explicit(const volatile threadgroup atomic<T>*, memory_order);
template <typename T>
T atomic_fetch_add_explicit(volatile threadgroup atomic<T>*, T, memory_order);
template <typename T>
bool atomic_compare_exchange_weak_explicit(volatile threadgroup atomic<T>*, thread T*, T, memory_order, memory_order);

namespace mem_flags {
constexpr constant uint mem_device = 1;
constexpr constant uint mem_threadgroup = 2;
}  // namespace mem_flags
void threadgroup_barrier(uint);

template <typename T>
T simd_sum(T);
template <typename T>
T simd_max(T);
uint simd_prefix_exclusive_sum(uint);
bool simd_any(bool);
}  // namespace metal
using namespace metal;
