// The part of the Metal standard library, and of MLX's own prelude, that custom kernels use, in C++17 for g++.
//
// Address spaces are empty words; a half is _Float16; a bfloat is a class that, as in Metal, turns into a float by
// itself but is made from one only explicitly. What needs other threads, or is watched, calls the runtime.
#pragma once

#include <cfloat>
#include <climits>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "metal_shared.h"

#define EMULATOR_INLINE inline __attribute__((always_inline))
#define EMULATOR_UNSEEN __attribute__((noinline, no_sanitize_thread))

#undef isnan
#undef isinf
#undef isfinite
#undef signbit

namespace metal {

// ---------------------------------------------------------------- scalars

using uchar = unsigned char;
using ushort = unsigned short;
using uint = unsigned int;
using ulong = unsigned long;
using half = _Float16;
using std::int16_t;
using std::int32_t;
using std::int64_t;
using std::int8_t;
using std::ptrdiff_t;
using std::size_t;
using std::uint16_t;
using std::uint32_t;
using std::uint64_t;
using std::uint8_t;

template <typename To, typename From>
EMULATOR_INLINE constexpr To as_type(const From &from) {
    static_assert(sizeof(To) == sizeof(From), "as_type needs two types of one size");
    return __builtin_bit_cast(To, from);
}

struct bfloat {
    uint16_t bits;
    bfloat() = default;
    EMULATOR_INLINE constexpr explicit bfloat(float value) : bits(rounded(value)) {}
    template <typename A, typename = std::enable_if_t<std::is_arithmetic_v<A> || std::is_same_v<A, half>>>
    EMULATOR_INLINE constexpr explicit bfloat(A value) : bits(rounded(float(value))) {}
    EMULATOR_INLINE constexpr operator float() const { return as_type<float>(uint32_t(bits) << 16); }

    EMULATOR_INLINE static constexpr uint16_t rounded(float value) {  // to nearest, ties to even
        uint32_t word = as_type<uint32_t>(value);
        if (value != value) return uint16_t((word >> 16) | 0x40);
        return uint16_t((word + 0x7fff + ((word >> 16) & 1)) >> 16);
    }
};

template <typename T> constexpr bool em_is_small_float = std::is_same_v<T, half> || std::is_same_v<T, bfloat>;
template <typename T> constexpr bool em_is_number = std::is_arithmetic_v<T> || em_is_small_float<T>;

// bfloat with bfloat, or with an integer, gives a bfloat; with a float (or a half) the built-in operators give a float.
#define EMULATOR_BFLOAT(op)                                                                                            \
    EMULATOR_INLINE constexpr bfloat operator op(bfloat a, bfloat b) { return bfloat(float(a) op float(b)); }          \
    template <typename I, typename = std::enable_if_t<std::is_integral_v<I>>>                                          \
    EMULATOR_INLINE constexpr bfloat operator op(bfloat a, I b) { return bfloat(float(a) op float(b)); }               \
    template <typename I, typename = std::enable_if_t<std::is_integral_v<I>>>                                          \
    EMULATOR_INLINE constexpr bfloat operator op(I a, bfloat b) { return bfloat(float(a) op float(b)); }               \
    template <typename A>                                                                                              \
    EMULATOR_INLINE bfloat &operator op##=(bfloat &a, A b) { return a = bfloat(float(a) op float(b)); }
EMULATOR_BFLOAT(+)
EMULATOR_BFLOAT(-)
EMULATOR_BFLOAT(*)
EMULATOR_BFLOAT(/)
#undef EMULATOR_BFLOAT
EMULATOR_INLINE constexpr bfloat operator-(bfloat a) { return bfloat(-float(a)); }
EMULATOR_INLINE bfloat &operator++(bfloat &a) { return a = bfloat(float(a) + 1); }
EMULATOR_INLINE bfloat &operator--(bfloat &a) { return a = bfloat(float(a) - 1); }

template <typename T> struct numeric_limits : std::numeric_limits<T> {};

#define EMULATOR_LIMITS(T, of, largest, smallest, step, digits_)                                                       \
    template <> struct numeric_limits<T> {                                                                             \
        static constexpr bool is_specialized = true, is_signed = true, is_integer = false, has_infinity = true;        \
        static constexpr int digits = digits_, radix = 2;                                                              \
        static constexpr T max() { return of(largest); }                                                               \
        static constexpr T lowest() { return of(uint16_t(largest | 0x8000)); }                                         \
        static constexpr T min() { return of(smallest); }                                                              \
        static constexpr T epsilon() { return of(step); }                                                              \
        static constexpr T infinity() { return of(uint16_t(largest + 1)); }                                            \
        static constexpr T quiet_NaN() { return of(uint16_t(largest + 1 + (1 << (digits_ - 2)))); }                    \
    };
constexpr half em_half_of(uint16_t bits) { return as_type<half>(bits); }
constexpr bfloat em_bfloat_of(uint16_t bits) { return as_type<bfloat>(bits); }
EMULATOR_LIMITS(half, em_half_of, uint16_t(0x7bff), uint16_t(0x0400), uint16_t(0x1400), 11)
EMULATOR_LIMITS(bfloat, em_bfloat_of, uint16_t(0x7f7f), uint16_t(0x0080), uint16_t(0x3c00), 8)
#undef EMULATOR_LIMITS

using std::conditional;
using std::conditional_t;
using std::decay_t;
using std::declval;
using std::enable_if;
using std::enable_if_t;
using std::false_type;
using std::integral_constant;
using std::is_convertible_v;
using std::is_integral;
using std::is_integral_v;
using std::is_pointer_v;
using std::is_same;
using std::is_same_v;
using std::is_signed;
using std::is_signed_v;
using std::is_unsigned;
using std::is_unsigned_v;
using std::make_signed_t;
using std::make_unsigned_t;
using std::remove_cv_t;
using std::remove_reference_t;
using std::true_type;
template <typename T>
struct is_floating_point : std::bool_constant<std::is_same_v<T, float> || em_is_small_float<T>> {};
template <typename T> constexpr bool is_floating_point_v = is_floating_point<T>::value;
template <typename T> struct is_arithmetic : std::bool_constant<em_is_number<T>> {};
template <typename T> constexpr bool is_arithmetic_v = em_is_number<T>;

template <typename T, size_t N> struct array {
    T elements[N];
    EMULATOR_INLINE T &operator[](size_t i) { return elements[i]; }
    EMULATOR_INLINE const T &operator[](size_t i) const { return elements[i]; }
    static constexpr size_t size() { return N; }
};

// ---------------------------------------------------------------- vectors

template <typename T, int N> struct vec;

template <typename T, int... I> struct em_swizzle {  // v.xyz and the like, a view of the vector it is a member of
    T data[4];
    EMULATOR_INLINE operator vec<T, sizeof...(I)>() const;
    EMULATOR_INLINE em_swizzle &operator=(const vec<T, sizeof...(I)> &from);
};

template <typename A> struct em_vector_of { using type = void; static constexpr int size = 0; };
template <typename T, int N> struct em_vector_of<vec<T, N>> {
    using type = vec<T, N>;
    static constexpr int size = N;
};
template <typename T, int... I> struct em_vector_of<em_swizzle<T, I...>> {
    using type = vec<T, sizeof...(I)>;
    static constexpr int size = sizeof...(I);
};
template <typename T, int N> struct packed_vec;
template <typename T, int N> struct em_vector_of<packed_vec<T, N>> {
    using type = vec<T, N>;
    static constexpr int size = N;
};
template <typename A> constexpr int em_width_of = em_vector_of<A>::size;

#define EMULATOR_VECTOR_BODY(N)                                                                                        \
    using element = T;                                                                                                 \
    vec() = default;                                                                                                   \
    template <typename A, typename = std::enable_if_t<em_is_number<A>>>                                                \
    EMULATOR_INLINE vec(A all) { for (int i = 0; i < N; i++) data[i] = T(all); }                                       \
    template <typename U, typename = std::enable_if_t<!std::is_same_v<U, T>>>                                          \
    EMULATOR_INLINE explicit vec(const vec<U, N> &from) { for (int i = 0; i < N; i++) data[i] = T(from.data[i]); }     \
    EMULATOR_INLINE explicit vec(const uint32_t *from) { for (int i = 0; i < N; i++) data[i] = T(from[i]); }           \
    EMULATOR_INLINE T &operator[](size_t i) { return data[i]; }                                                        \
    EMULATOR_INLINE const T &operator[](size_t i) const { return data[i]; }

template <typename T> struct vec<T, 2> {
    union {
        T data[2];
        struct { T x, y; };
        struct { T r, g; };
    };
    EMULATOR_VECTOR_BODY(2)
    EMULATOR_INLINE vec(T a, T b) : x(a), y(b) {}
};

template <typename T> struct vec<T, 3> {  // as large as one of four
    union {
        T data[4];
        struct { T x, y, z; };
        struct { T r, g, b; };
        em_swizzle<T, 0, 1> xy;
        em_swizzle<T, 1, 2> yz;
        em_swizzle<T, 0, 2> xz;
        em_swizzle<T, 0, 1, 2> xyz;
    };
    EMULATOR_VECTOR_BODY(3)
    EMULATOR_INLINE vec(T a, T b, T c) : x(a), y(b), z(c) {}
    EMULATOR_INLINE vec(const vec<T, 2> &a, T c) : x(a.x), y(a.y), z(c) {}
};

template <typename T> struct vec<T, 4> {
    union {
        T data[4];
        struct { T x, y, z, w; };
        struct { T r, g, b, a; };
        em_swizzle<T, 0, 1> xy, rg, lo;
        em_swizzle<T, 2, 3> zw, ba, hi;
        em_swizzle<T, 1, 2> yz;
        em_swizzle<T, 0, 2> xz, even;
        em_swizzle<T, 1, 3> yw, odd;
        em_swizzle<T, 0, 1, 2> xyz, rgb;
        em_swizzle<T, 1, 2, 3> yzw;
        em_swizzle<T, 0, 1, 2, 3> xyzw;
        em_swizzle<T, 3, 2, 1, 0> wzyx;
    };
    EMULATOR_VECTOR_BODY(4)
    EMULATOR_INLINE vec(T p, T q, T s, T t) : x(p), y(q), z(s), w(t) {}
    EMULATOR_INLINE vec(const vec<T, 2> &p, const vec<T, 2> &q) : x(p.x), y(p.y), z(q.x), w(q.y) {}
    EMULATOR_INLINE vec(const vec<T, 3> &p, T t) : x(p.x), y(p.y), z(p.z), w(t) {}
};
#undef EMULATOR_VECTOR_BODY

template <typename T, int... I>
EMULATOR_INLINE em_swizzle<T, I...>::operator vec<T, sizeof...(I)>() const {
    return {data[I]...};
}
template <typename T, int... I>
EMULATOR_INLINE em_swizzle<T, I...> &em_swizzle<T, I...>::operator=(const vec<T, sizeof...(I)> &from) {
    int next = 0;
    ((data[I] = from.data[next++]), ...);
    return *this;
}

template <int N, typename A> EMULATOR_INLINE auto em_widened(const A &a) {
    if constexpr (em_width_of<A> > 0) {
        return typename em_vector_of<A>::type(a);
    } else {
        return vec<A, N>(a);
    }
}
template <typename A, typename B>
constexpr bool em_vector_pair = (em_width_of<A> > 0 && em_width_of<B> == em_width_of<A>) ||
                             (em_width_of<A> > 0 && em_is_number<B>) || (em_width_of<B> > 0 && em_is_number<A>);
template <typename A, typename B> constexpr int em_pair_width = em_width_of<A> > 0 ? em_width_of<A> : em_width_of<B>;
// The vector's element type wins over a scalar's, as a scalar is converted to the vector's type.
template <typename A, typename B>
using em_pair_type = typename std::conditional_t<(em_width_of<A> > 0), em_vector_of<A>, em_vector_of<B>>::type;

#define EMULATOR_BINARY(op)                                                                                            \
    template <typename A, typename B, typename = std::enable_if_t<em_vector_pair<A, B>>>                               \
    EMULATOR_INLINE em_pair_type<A, B> operator op(const A &a, const B &b) {                                           \
        using R = em_pair_type<A, B>;                                                                                  \
        R p = R(em_widened<em_pair_width<A, B>>(a)), q = R(em_widened<em_pair_width<A, B>>(b)), out;                   \
        for (int i = 0; i < em_pair_width<A, B>; i++) out.data[i] = typename R::element(p.data[i] op q.data[i]);       \
        return out;                                                                                                    \
    }                                                                                                                  \
    template <typename A, typename B, typename = std::enable_if_t<(em_width_of<A> > 0)>>                               \
    EMULATOR_INLINE A &operator op##=(A &a, const B &b) { return a = a op b; }
EMULATOR_BINARY(+)
EMULATOR_BINARY(-)
EMULATOR_BINARY(*)
EMULATOR_BINARY(/)
EMULATOR_BINARY(%)
EMULATOR_BINARY(&)
EMULATOR_BINARY(|)
EMULATOR_BINARY(^)
EMULATOR_BINARY(<<)
EMULATOR_BINARY(>>)
#undef EMULATOR_BINARY
#define EMULATOR_COMPARE(op)                                                                                           \
    template <typename A, typename B, typename = std::enable_if_t<em_vector_pair<A, B>>>                               \
    EMULATOR_INLINE vec<bool, em_pair_width<A, B>> operator op(const A &a, const B &b) {                               \
        using R = em_pair_type<A, B>;                                                                                  \
        R p = R(em_widened<em_pair_width<A, B>>(a)), q = R(em_widened<em_pair_width<A, B>>(b));                        \
        vec<bool, em_pair_width<A, B>> out;                                                                            \
        for (int i = 0; i < em_pair_width<A, B>; i++) out.data[i] = p.data[i] op q.data[i];                            \
        return out;                                                                                                    \
    }
EMULATOR_COMPARE(==)
EMULATOR_COMPARE(!=)
EMULATOR_COMPARE(<)
EMULATOR_COMPARE(<=)
EMULATOR_COMPARE(>)
EMULATOR_COMPARE(>=)
#undef EMULATOR_COMPARE
template <typename T, int N> EMULATOR_INLINE vec<T, N> operator-(const vec<T, N> &a) {
    vec<T, N> out;
    for (int i = 0; i < N; i++) out.data[i] = T(-a.data[i]);
    return out;
}
template <int N> EMULATOR_INLINE vec<bool, N> operator!(const vec<bool, N> &a) {
    vec<bool, N> out;
    for (int i = 0; i < N; i++) out.data[i] = !a.data[i];
    return out;
}
template <int N> EMULATOR_INLINE bool any(const vec<bool, N> &a) {
    bool out = false;
    for (int i = 0; i < N; i++) out = out || a.data[i];
    return out;
}
template <int N> EMULATOR_INLINE bool all(const vec<bool, N> &a) {
    bool out = true;
    for (int i = 0; i < N; i++) out = out && a.data[i];
    return out;
}

template <typename T, int N> struct packed_vec {
    T data[N];
    packed_vec() = default;
    EMULATOR_INLINE packed_vec(const vec<T, N> &from) { for (int i = 0; i < N; i++) data[i] = from.data[i]; }
    EMULATOR_INLINE operator vec<T, N>() const {
        vec<T, N> out;
        for (int i = 0; i < N; i++) out.data[i] = data[i];
        return out;
    }
    EMULATOR_INLINE T &operator[](size_t i) { return data[i]; }
    EMULATOR_INLINE const T &operator[](size_t i) const { return data[i]; }
};

#define EMULATOR_NAMES(T)                                                                                              \
    using T##2 = vec<T, 2>;                                                                                            \
    using T##3 = vec<T, 3>;                                                                                            \
    using T##4 = vec<T, 4>;                                                                                            \
    using packed_##T##2 = packed_vec<T, 2>;                                                                            \
    using packed_##T##3 = packed_vec<T, 3>;                                                                            \
    using packed_##T##4 = packed_vec<T, 4>;
EMULATOR_NAMES(bool)
EMULATOR_NAMES(char)
EMULATOR_NAMES(uchar)
EMULATOR_NAMES(short)
EMULATOR_NAMES(ushort)
EMULATOR_NAMES(int)
EMULATOR_NAMES(uint)
EMULATOR_NAMES(long)
EMULATOR_NAMES(ulong)
EMULATOR_NAMES(half)
EMULATOR_NAMES(bfloat)
EMULATOR_NAMES(float)
#undef EMULATOR_NAMES

// ---------------------------------------------------------------- mathematics

#define EMULATOR_MATH1(name, formula)                                                                                  \
    EMULATOR_INLINE float name(float x) { return formula; }                                                            \
    EMULATOR_INLINE half name(half h) { float x = h; return half(formula); }                                           \
    EMULATOR_INLINE bfloat name(bfloat b) { float x = b; return bfloat(formula); }                                     \
    template <typename T, int N> EMULATOR_INLINE vec<T, N> name(const vec<T, N> &v) {                                  \
        vec<T, N> out;                                                                                                 \
        for (int i = 0; i < N; i++) out.data[i] = name(v.data[i]);                                                     \
        return out;                                                                                                    \
    }
EMULATOR_MATH1(exp, __builtin_expf(x))
EMULATOR_MATH1(exp2, __builtin_exp2f(x))
EMULATOR_MATH1(exp10, __builtin_powf(10.0f, x))
EMULATOR_MATH1(log, __builtin_logf(x))
EMULATOR_MATH1(log2, __builtin_log2f(x))
EMULATOR_MATH1(log10, __builtin_log10f(x))
EMULATOR_MATH1(sqrt, __builtin_sqrtf(x))
EMULATOR_MATH1(rsqrt, 1.0f / __builtin_sqrtf(x))
EMULATOR_MATH1(sin, __builtin_sinf(x))
EMULATOR_MATH1(cos, __builtin_cosf(x))
EMULATOR_MATH1(tan, __builtin_tanf(x))
EMULATOR_MATH1(asin, __builtin_asinf(x))
EMULATOR_MATH1(acos, __builtin_acosf(x))
EMULATOR_MATH1(atan, __builtin_atanf(x))
EMULATOR_MATH1(sinh, __builtin_sinhf(x))
EMULATOR_MATH1(cosh, __builtin_coshf(x))
EMULATOR_MATH1(tanh, __builtin_tanhf(x))
EMULATOR_MATH1(asinh, __builtin_asinhf(x))
EMULATOR_MATH1(acosh, __builtin_acoshf(x))
EMULATOR_MATH1(atanh, __builtin_atanhf(x))
EMULATOR_MATH1(floor, __builtin_floorf(x))
EMULATOR_MATH1(ceil, __builtin_ceilf(x))
EMULATOR_MATH1(trunc, __builtin_truncf(x))
EMULATOR_MATH1(rint, __builtin_rintf(x))
EMULATOR_MATH1(round, __builtin_roundf(x))
EMULATOR_MATH1(fabs, __builtin_fabsf(x))
EMULATOR_MATH1(fract, __builtin_fminf(x - __builtin_floorf(x), 0x1.fffffep-1f))
EMULATOR_MATH1(sign, x > 0 ? 1.0f : x < 0 ? -1.0f : x == x ? x : 0.0f)
EMULATOR_MATH1(saturate, __builtin_fminf(__builtin_fmaxf(x, 0.0f), 1.0f))
#undef EMULATOR_MATH1

#define EMULATOR_MATH2(name, formula)                                                                                  \
    EMULATOR_INLINE float name(float x, float y) { return formula; }                                                   \
    EMULATOR_INLINE half name(half a, half b) { float x = a, y = b; return half(formula); }                            \
    EMULATOR_INLINE bfloat name(bfloat a, bfloat b) { float x = a, y = b; return bfloat(formula); }                    \
    template <typename T, int N> EMULATOR_INLINE vec<T, N> name(const vec<T, N> &v, const vec<T, N> &u) {              \
        vec<T, N> out;                                                                                                 \
        for (int i = 0; i < N; i++) out.data[i] = name(v.data[i], u.data[i]);                                          \
        return out;                                                                                                    \
    }
EMULATOR_MATH2(pow, __builtin_powf(x, y))
EMULATOR_MATH2(powr, __builtin_powf(x, y))
EMULATOR_MATH2(fmod, __builtin_fmodf(x, y))
EMULATOR_MATH2(atan2, __builtin_atan2f(x, y))
EMULATOR_MATH2(copysign, __builtin_copysignf(x, y))
EMULATOR_MATH2(fmin, __builtin_fminf(x, y))
EMULATOR_MATH2(fmax, __builtin_fmaxf(x, y))
EMULATOR_MATH2(fdim, __builtin_fdimf(x, y))
EMULATOR_MATH2(step, y < x ? 0.0f : 1.0f)
#undef EMULATOR_MATH2

template <typename T, typename = std::enable_if_t<em_is_number<T>>> EMULATOR_INLINE T min(T a, T b) {
    if constexpr (is_floating_point_v<T>) {
        return fmin(a, b);
    } else {
        return b < a ? b : a;
    }
}
template <typename T, typename = std::enable_if_t<em_is_number<T>>> EMULATOR_INLINE T max(T a, T b) {
    if constexpr (is_floating_point_v<T>) {
        return fmax(a, b);
    } else {
        return a < b ? b : a;
    }
}
#define EMULATOR_VECTOR2(name)                                                                                         \
    template <typename A, typename B, typename = std::enable_if_t<em_vector_pair<A, B>>, typename = void>              \
    EMULATOR_INLINE em_pair_type<A, B> name(const A &a, const B &b) {                                                  \
        using R = em_pair_type<A, B>;                                                                                  \
        R p = R(em_widened<em_pair_width<A, B>>(a)), q = R(em_widened<em_pair_width<A, B>>(b)), out;                   \
        for (int i = 0; i < em_pair_width<A, B>; i++) out.data[i] = name(p.data[i], q.data[i]);                        \
        return out;                                                                                                    \
    }
EMULATOR_VECTOR2(min)
EMULATOR_VECTOR2(max)
#undef EMULATOR_VECTOR2
template <typename T> EMULATOR_INLINE T min3(T a, T b, T c) { return min(min(a, b), c); }
template <typename T> EMULATOR_INLINE T max3(T a, T b, T c) { return max(max(a, b), c); }
template <typename T, typename B> EMULATOR_INLINE T clamp(T x, B low, B high) { return min(max(x, low), high); }

template <typename T> EMULATOR_INLINE T abs(T x) {
    if constexpr (is_floating_point_v<T>) {
        return fabs(x);
    } else if constexpr (std::is_unsigned_v<T>) {
        return x;
    } else if constexpr (em_width_of<T> > 0) {
        for (int i = 0; i < em_width_of<T>; i++) x.data[i] = abs(x.data[i]);
        return x;
    } else {
        return x < 0 ? T(-x) : x;
    }
}

EMULATOR_INLINE float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
EMULATOR_INLINE half fma(half a, half b, half c) { return half(__builtin_fma(double(a), double(b), double(c))); }
EMULATOR_INLINE bfloat fma(bfloat a, bfloat b, bfloat c) { return bfloat(__builtin_fmaf(a, b, c)); }
template <typename T, int N>
EMULATOR_INLINE vec<T, N> fma(const vec<T, N> &a, const vec<T, N> &b, const vec<T, N> &c) {
    vec<T, N> out;
    for (int i = 0; i < N; i++) out.data[i] = fma(a.data[i], b.data[i], c.data[i]);
    return out;
}
template <typename T> EMULATOR_INLINE T mad(T a, T b, T c) {
    if constexpr (std::is_integral_v<T>) {
        return a * b + c;
    } else {
        return fma(a, b, c);
    }
}
template <typename T, typename U> EMULATOR_INLINE T mix(T a, T b, U t) { return a + (b - a) * t; }
EMULATOR_INLINE float ldexp(float x, int n) { return __builtin_ldexpf(x, n); }
EMULATOR_INLINE half ldexp(half x, int n) { return half(__builtin_ldexpf(x, n)); }

// Metal's select takes the second value where the condition holds.
template <typename T, typename = std::enable_if_t<em_is_number<T>>> EMULATOR_INLINE T select(T a, T b, bool second) {
    return second ? b : a;
}
template <typename T, int N>
EMULATOR_INLINE vec<T, N> select(const vec<T, N> &a, const vec<T, N> &b, const vec<bool, N> &second) {
    vec<T, N> out;
    for (int i = 0; i < N; i++) out.data[i] = second.data[i] ? b.data[i] : a.data[i];
    return out;
}

#define EMULATOR_TEST(name, builtin)                                                                                   \
    EMULATOR_INLINE bool name(float x) { return builtin(x) != 0; }                                                     \
    EMULATOR_INLINE bool name(half x) { return builtin(float(x)) != 0; }                                               \
    EMULATOR_INLINE bool name(bfloat x) { return builtin(float(x)) != 0; }                                             \
    template <typename T, int N> EMULATOR_INLINE vec<bool, N> name(const vec<T, N> &v) {                               \
        vec<bool, N> out;                                                                                              \
        for (int i = 0; i < N; i++) out.data[i] = name(v.data[i]);                                                     \
        return out;                                                                                                    \
    }
EMULATOR_TEST(isnan, __builtin_isnan)
EMULATOR_TEST(isinf, __builtin_isinf)
EMULATOR_TEST(isfinite, __builtin_isfinite)
EMULATOR_TEST(isnormal, __builtin_isnormal)
EMULATOR_TEST(signbit, __builtin_signbit)
#undef EMULATOR_TEST

template <typename T, int N> EMULATOR_INLINE T dot(const vec<T, N> &a, const vec<T, N> &b) {
    T out = a.data[0] * b.data[0];
    for (int i = 1; i < N; i++) out = T(out + a.data[i] * b.data[i]);
    return out;
}
template <typename T, int N> EMULATOR_INLINE T length_squared(const vec<T, N> &a) { return dot(a, a); }
template <typename T, int N> EMULATOR_INLINE T length(const vec<T, N> &a) { return sqrt(dot(a, a)); }

template <typename T> EMULATOR_INLINE T popcount(T x) {
    return T(__builtin_popcountll(static_cast<std::make_unsigned_t<T>>(x)));
}
template <typename T> EMULATOR_INLINE T clz(T x) {
    auto bits = static_cast<std::make_unsigned_t<T>>(x);
    return T(bits ? __builtin_clzll(bits) - (64 - int(8 * sizeof(T))) : int(8 * sizeof(T)));
}
template <typename T> EMULATOR_INLINE T ctz(T x) {
    auto bits = static_cast<std::make_unsigned_t<T>>(x);
    return T(bits ? __builtin_ctzll(bits) : int(8 * sizeof(T)));
}
template <typename T> EMULATOR_INLINE T reverse_bits(T x) {
    auto bits = static_cast<std::make_unsigned_t<T>>(x);
    decltype(bits) out = 0;
    for (size_t i = 0; i < 8 * sizeof(T); i++) out = decltype(bits)(out << 1) | ((bits >> i) & 1);
    return T(out);
}
template <typename T> EMULATOR_INLINE T rotate(T x, T by) {
    auto bits = static_cast<std::make_unsigned_t<T>>(x);
    unsigned n = unsigned(by) % (8 * sizeof(T));
    return n ? T((bits << n) | (bits >> (8 * sizeof(T) - n))) : x;
}
template <typename T> EMULATOR_INLINE T mulhi(T a, T b) {
    using Wide = std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>;
    return T((Wide(a) * Wide(b)) >> (8 * sizeof(T)));
}
template <typename T> EMULATOR_INLINE T extract_bits(T x, uint offset, uint bits) {
    if (bits == 0) return 0;
    int top = int(8 * sizeof(T));
    return T(T(x << (top - int(offset) - int(bits))) >> (top - int(bits)));
}

namespace fast {
using namespace metal;
}
namespace precise {
using namespace metal;
}

// ---------------------------------------------------------------- the threads of a simdgroup

template <typename T> struct em_lanes {
    const emulator_exchange *exchange;
    EMULATOR_INLINE em_lanes(int operation, const T &value) : exchange(emulator_simd(operation, &value, sizeof(T))) {
        static_assert(sizeof(T) <= 16, "a simd operation takes at most 16 bytes per lane");
    }
    EMULATOR_INLINE bool has(int lane) const { return lane >= 0 && lane < 32 && (exchange->active >> lane & 1); }
    EMULATOR_INLINE T at(int lane) const {
        T out;
        __builtin_memcpy(&out, exchange->values[lane & 31], sizeof(T));
        return out;
    }
};

// Combines the lanes pairwise, at distances 1, 2, 4, 8 and 16, as a butterfly of shuffles does.
template <typename T, typename F> EMULATOR_UNSEEN T em_reduce(const emulator_exchange *exchange, F combine) {
    T value[32];
    uint32_t has = exchange->active;
    __builtin_memset(value, 0, sizeof value);
    for (int i = 0; i < 32; i++) __builtin_memcpy(&value[i], exchange->values[i], sizeof(T));
    for (int distance = 1; distance < 32; distance *= 2) {
        for (int i = 0; i + distance < 32; i += 2 * distance) {
            bool low = has >> i & 1, high = has >> (i + distance) & 1;
            if (low && high) value[i] = combine(value[i], value[i + distance]);
            if (!low && high) value[i] = value[i + distance];
            if (high) has |= 1u << i;
        }
    }
    return value[0];
}

#define EMULATOR_REDUCE(name, operation, formula)                                                                      \
    template <typename T> EMULATOR_INLINE T name(T x) {                                                                \
        auto combine = [](const T &a, const T &b) { return T(formula); };                                              \
        return em_reduce<T>(emulator_simd(operation, &x, sizeof(T)), combine);                                         \
    }
EMULATOR_REDUCE(simd_sum, op_sum, a + b)
EMULATOR_REDUCE(simd_product, op_product, a *b)
EMULATOR_REDUCE(simd_max, op_max, max(a, b))
EMULATOR_REDUCE(simd_min, op_min, min(a, b))
EMULATOR_REDUCE(simd_and, op_and, a &b)
EMULATOR_REDUCE(simd_or, op_or, a | b)
EMULATOR_REDUCE(simd_xor, op_xor, a ^ b)
#undef EMULATOR_REDUCE

struct simd_vote {
    using vote_t = uint64_t;
    vote_t votes, active;
    EMULATOR_INLINE explicit operator vote_t() const { return votes; }
    EMULATOR_INLINE bool all() const { return votes == active; }
    EMULATOR_INLINE bool any() const { return votes != 0; }
};
EMULATOR_INLINE simd_vote em_votes_of(const em_lanes<uchar> &in) {
    simd_vote out{0, in.exchange->active};
    for (int i = 0; i < 32; i++) out.votes |= uint64_t(in.has(i) && in.at(i)) << i;
    return out;
}
EMULATOR_INLINE bool simd_any(bool x) { return em_votes_of(em_lanes<uchar>(op_any, x)).any(); }
EMULATOR_INLINE bool simd_all(bool x) { return em_votes_of(em_lanes<uchar>(op_all, x)).all(); }
EMULATOR_INLINE simd_vote simd_ballot(bool x) { return em_votes_of(em_lanes<uchar>(op_ballot, x)); }
EMULATOR_INLINE simd_vote simd_active_threads_mask() { return em_votes_of(em_lanes<uchar>(op_active, 1)); }
EMULATOR_INLINE bool simd_is_first() {
    em_lanes<uchar> in(op_is_first, 1);
    return int(emulator_lane()) == __builtin_ctz(in.exchange->active);
}
EMULATOR_INLINE bool simd_is_helper_thread() { return false; }

template <typename T> EMULATOR_INLINE T simd_broadcast(T x, ushort lane) {
    return em_lanes<T>(op_broadcast, x).at(lane);
}
template <typename T> EMULATOR_INLINE T simd_broadcast_first(T x) {
    em_lanes<T> in(op_broadcast_first, x);
    return in.at(__builtin_ctz(in.exchange->active));
}
template <typename T> EMULATOR_INLINE T simd_shuffle(T x, ushort lane) { return em_lanes<T>(op_shuffle, x).at(lane); }
template <typename T> EMULATOR_INLINE T simd_shuffle_xor(T x, ushort mask) {
    return em_lanes<T>(op_shuffle_xor, x).at(int(emulator_lane()) ^ mask);
}
template <typename T> EMULATOR_INLINE T simd_shuffle_up(T x, ushort delta) {
    em_lanes<T> in(op_shuffle_up, x);
    int from = int(emulator_lane()) - delta;
    return from >= 0 ? in.at(from) : x;
}
template <typename T> EMULATOR_INLINE T simd_shuffle_down(T x, ushort delta) {
    em_lanes<T> in(op_shuffle_down, x);
    int from = int(emulator_lane()) + delta;
    return from < 32 ? in.at(from) : x;
}

template <typename T, typename F>
EMULATOR_INLINE T em_scan(const em_lanes<T> &in, T start, bool inclusive, F combine) {
    int own = int(emulator_lane());
    for (int i = 0; i < own + (inclusive ? 1 : 0); i++) {
        if (in.has(i)) start = combine(start, in.at(i));
    }
    return start;
}
#define EMULATOR_SCAN(name, operation, start, inclusive, op)                                                           \
    template <typename T> EMULATOR_INLINE T name(T x) {                                                                \
        return em_scan(em_lanes<T>(operation, x), T(start), inclusive, [](const T &a, const T &b) __attribute__((      \
            always_inline)) { return T(a op b); });                                                                    \
    }
EMULATOR_SCAN(simd_prefix_inclusive_sum, op_prefix_inclusive_sum, 0, true, +)
EMULATOR_SCAN(simd_prefix_exclusive_sum, op_prefix_exclusive_sum, 0, false, +)
EMULATOR_SCAN(simd_prefix_inclusive_product, op_prefix_inclusive_product, 1, true, *)
EMULATOR_SCAN(simd_prefix_exclusive_product, op_prefix_exclusive_product, 1, false, *)
#undef EMULATOR_SCAN

// ---------------------------------------------------------------- barriers, threadgroup memory, atomics

enum class mem_flags : int {
    mem_none = 0,
    mem_device = emulator_mem_device,
    mem_threadgroup = emulator_mem_threadgroup,
    mem_texture = emulator_mem_texture,
};
EMULATOR_INLINE constexpr mem_flags operator|(mem_flags a, mem_flags b) { return mem_flags(int(a) | int(b)); }
EMULATOR_INLINE constexpr mem_flags operator&(mem_flags a, mem_flags b) { return mem_flags(int(a) & int(b)); }
EMULATOR_INLINE void threadgroup_barrier(mem_flags flags) { emulator_barrier(int(flags)); }
EMULATOR_INLINE void simdgroup_barrier(mem_flags flags) {
    int value = int(flags);
    emulator_simd(op_simdgroup_barrier, &value, sizeof value);
}

enum memory_order : int {
    memory_order_relaxed, memory_order_acquire, memory_order_release, memory_order_acq_rel, memory_order_seq_cst,
};
enum thread_scope : int {
    thread_scope_thread, thread_scope_simdgroup, thread_scope_threadgroup, thread_scope_device, thread_scope_system,
};
template <typename... A> EMULATOR_INLINE void atomic_thread_fence(A...) {}

template <typename T> struct atomic {
    static_assert(std::is_same_v<T, int> || std::is_same_v<T, uint> || std::is_same_v<T, bool> ||
                      std::is_same_v<T, float> || std::is_same_v<T, ulong>,
                  "Metal has atomic<T> for int, uint, bool, float and ulong");
    T value;
};
using atomic_int = atomic<int>;
using atomic_uint = atomic<uint>;
using atomic_bool = atomic<bool>;
using atomic_float = atomic<float>;
using atomic_ulong = atomic<ulong>;

template <typename T, typename F> EMULATOR_UNSEEN T em_exchanged(volatile atomic<T> *object, F change) {
    T before = object->value;
    object->value = change(before);
    return before;
}
template <typename T> EMULATOR_UNSEEN T em_loaded(const volatile atomic<T> *object) { return object->value; }
template <typename T> using em_plain = typename std::common_type<T>::type;  // no deduction from the value

template <typename T> EMULATOR_INLINE T atomic_load_explicit(const volatile atomic<T> *object, memory_order) {
    emulator_atomic(const_cast<atomic<T> *>(object), sizeof(T), 1, 0);
    return em_loaded(object);
}
template <typename T>
EMULATOR_INLINE void atomic_store_explicit(volatile atomic<T> *object, em_plain<T> value, memory_order) {
    emulator_atomic(const_cast<atomic<T> *>(object), sizeof(T), 0, 1);
    em_exchanged(object, [value](T) __attribute__((no_sanitize_thread)) { return value; });
}
#define EMULATOR_ATOMIC(name, formula)                                                                                 \
    template <typename T>                                                                                              \
    EMULATOR_INLINE T name(volatile atomic<T> *object, em_plain<T> value, memory_order) {                              \
        emulator_atomic(const_cast<atomic<T> *>(object), sizeof(T), 1, 1);                                             \
        return em_exchanged(object, [value](T before) __attribute__((no_sanitize_thread)) {                            \
            (void)before;                                                                                              \
            return T(formula);                                                                                         \
        });                                                                                                            \
    }
EMULATOR_ATOMIC(atomic_exchange_explicit, value)
EMULATOR_ATOMIC(atomic_fetch_add_explicit, before + value)
EMULATOR_ATOMIC(atomic_fetch_sub_explicit, before - value)
EMULATOR_ATOMIC(atomic_fetch_min_explicit, value < before ? value : before)
EMULATOR_ATOMIC(atomic_fetch_max_explicit, before < value ? value : before)
EMULATOR_ATOMIC(atomic_fetch_and_explicit, before &value)
EMULATOR_ATOMIC(atomic_fetch_or_explicit, before | value)
EMULATOR_ATOMIC(atomic_fetch_xor_explicit, before ^ value)
#undef EMULATOR_ATOMIC
template <typename T>
EMULATOR_INLINE bool atomic_compare_exchange_weak_explicit(volatile atomic<T> *object, T *expected, em_plain<T> desired,
                                                           memory_order, memory_order) {
    emulator_atomic(const_cast<atomic<T> *>(object), sizeof(T), 1, 1);
    T wanted = *expected;
    T before = em_exchanged(object, [=](T found) __attribute__((no_sanitize_thread)) {
        return as_type<std::conditional_t<sizeof(T) == 8, uint64_t, std::conditional_t<sizeof(T) == 1, uint8_t, uint>>>(
                   found) == as_type<std::conditional_t<sizeof(T) == 8, uint64_t,
                                                        std::conditional_t<sizeof(T) == 1, uint8_t, uint>>>(wanted)
                   ? desired
                   : found;
    });
    *expected = before;
    return __builtin_memcmp(&before, &wanted, sizeof(T)) == 0;
}

}  // namespace metal

// A threadgroup declaration becomes a reference to what this returns; see source.py.
template <int Array, typename T> EMULATOR_INLINE T &emulator_threadgroup() {
    return *static_cast<T *>(emulator_shared(Array, sizeof(T)));
}

using namespace metal;

// ---------------------------------------------------------------- MLX's prelude

#define METAL_FUNC inline __attribute__((always_inline))
#define MTL_CONST static constant constexpr const
#define MLX_MTL_PRAGMA_UNROLL
#define MLX_MTL_LOOP_UNROLL
#define M_PI_F 3.14159265358979323846f
#define M_PI_2_F 1.57079632679489661923f
#define M_1_PI_F 0.31830988618379067154f
#define M_E_F 2.71828182845904523536f
#define M_LN2_F 0.69314718055994530942f
#define M_LN10_F 2.30258509299404568402f
#define M_LOG2E_F 1.44269504088896340736f
#define M_LOG10E_F 0.43429448190325182765f
#define M_SQRT2_F 1.41421356237309504880f
#define MAXFLOAT FLT_MAX
#define HALF_MAX (metal::numeric_limits<metal::half>::max())

using float16_t = half;
using bfloat16_t = bfloat;

struct complex64_t {
    float real, imag;
    complex64_t() = default;
    EMULATOR_INLINE constexpr complex64_t(float r, float i = 0) : real(r), imag(i) {}
};
EMULATOR_INLINE constexpr complex64_t operator+(complex64_t a, complex64_t b) {
    return {a.real + b.real, a.imag + b.imag};
}
EMULATOR_INLINE constexpr complex64_t operator-(complex64_t a, complex64_t b) {
    return {a.real - b.real, a.imag - b.imag};
}
EMULATOR_INLINE constexpr complex64_t operator*(complex64_t a, complex64_t b) {
    return {a.real * b.real - a.imag * b.imag, a.real * b.imag + a.imag * b.real};
}

template <typename U> struct Limits {
    using numbers = metal::numeric_limits<U>;
    static constexpr bool real = metal::is_floating_point_v<U>;
    static constexpr U lowest() { return numbers::lowest(); }
    static constexpr U top() {
        if constexpr (real) {
            return numbers::infinity();
        } else {
            return numbers::max();
        }
    }
    static constexpr U bottom() {
        if constexpr (real) {
            return U(-numbers::infinity());
        } else {
            return numbers::lowest();
        }
    }
    static constexpr U max = top(), min = bottom(), finite_max = numbers::max(), finite_min = lowest();
};

template <typename T, typename U> EMULATOR_INLINE constexpr T ceildiv(T n, U m) { return (n + m - 1) / m; }

EMULATOR_INLINE float log1p(float x) { return __builtin_log1pf(x); }
EMULATOR_INLINE half log1p(half x) { return half(__builtin_log1pf(x)); }
EMULATOR_INLINE bfloat log1p(bfloat x) { return bfloat(__builtin_log1pf(x)); }

// Where element `elem` of a row-major walk lies in memory.
template <typename IdxT = int64_t>
EMULATOR_INLINE IdxT elem_to_loc(IdxT elem, const int *shape, const int64_t *strides, int ndim) {
    IdxT place = 0;
    for (int i = ndim - 1; i >= 0 && elem > 0; i--) {
        place += (elem % IdxT(shape[i])) * IdxT(strides[i]);
        elem /= IdxT(shape[i]);
    }
    return place;
}
template <typename IdxT = int64_t>
EMULATOR_INLINE IdxT elem_to_loc(uint3 elem, const int *shape, const int64_t *strides, int ndim) {
    IdxT place = elem.x * IdxT(strides[ndim - 1]) + elem.y * IdxT(strides[ndim - 2]);
    for (int i = ndim - 3; i >= 0; i--) {
        place += (elem.z % uint(shape[i])) * IdxT(strides[i]);
        elem.z /= uint(shape[i]);
    }
    return place;
}
template <typename IdxT = int64_t> EMULATOR_INLINE IdxT elem_to_loc_1(uint elem, const int64_t &stride) {
    return elem * IdxT(stride);
}
template <typename IdxT = int64_t> EMULATOR_INLINE IdxT elem_to_loc_2(uint2 elem, const int64_t *strides) {
    return elem.x * IdxT(strides[1]) + elem.y * IdxT(strides[0]);
}
template <typename IdxT = int64_t> EMULATOR_INLINE IdxT elem_to_loc_3(uint3 elem, const int64_t *strides) {
    return elem.x * IdxT(strides[2]) + elem.y * IdxT(strides[1]) + elem.z * IdxT(strides[0]);
}

#define device
#define constant
#define threadgroup
#define thread
#define threadgroup_imageblock
#define kernel
#define fragment
#pragma GCC poison double
