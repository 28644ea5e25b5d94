// Vectors of floats, mostly through the compilers' vector extensions: one source for every
// instruction set. Each .cpp file is compiled once per set, with its name in the macro ISA.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define INLINE inline __attribute__((always_inline))
#define NOINLINE __attribute__((noinline))
// A vector that is in a register from here on: of several uses, GCC would otherwise load it again for each.
#if defined(__AVX2__)
#define KEEP(x) asm("" : "+v"(x))
#else
#define KEEP(x)
#endif

namespace minivllm::ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#else
constexpr int kLanes = 8;
#endif

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t VecInt __attribute__((vector_size(kLanes * 4)));

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

INLINE Vec load(const float* from) {
    Vec v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

INLINE void store(float* to, Vec v) { std::memcpy(to, &v, sizeof v); }

INLINE Vec broadcast(float x) { return x - Vec{}; }  // subtracting zero leaves any float as it is

INLINE Vec max(Vec a, Vec b) { return a > b ? a : b; }

// a * b + c, rounded once where the instruction set can. Files are compiled with -ffp-contract=off, so
// that this is the only place where a product and a sum fuse: whether they do never depends on how
// the compiler arranged a loop, and a token's arithmetic never depends on its batch.
INLINE Vec fma(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
    return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
    return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}

// All lanes in one, by an operation on two vectors or numbers, always in the same order: halves, until one is left.
template <class V, class Operation>
INLINE auto fold_lanes(V v, Operation operation) {
    using T = std::decay_t<decltype(v[0])>;
#if defined(__AVX2__)
    typedef T Eight __attribute__((vector_size(8 * sizeof(T))));
    typedef T Four __attribute__((vector_size(4 * sizeof(T))));
#if defined(__AVX512F__)
    __m512 all = (__m512)v;
    Eight eight = operation((Eight)_mm512_castps512_ps256(all), (Eight)_mm512_extractf32x8_ps(all, 1));
#else
    Eight eight = v;
#endif
    __m256 halves = (__m256)eight;
    Four four = operation((Four)_mm256_castps256_ps128(halves), (Four)_mm256_extractf128_ps(halves, 1));
    Four two = operation(four, (Four)_mm_movehl_ps((__m128)four, (__m128)four));
    Four one = operation(two, (Four)_mm_movehdup_ps((__m128)two));
    return T(one[0]);
#else
    T lanes[kLanes];
    std::memcpy(lanes, &v, sizeof lanes);
    for (int width = kLanes / 2; width > 0; width /= 2)
        for (int i = 0; i < width; ++i) lanes[i] = operation(lanes[i], lanes[i + width]);
    return lanes[0];
#endif
}

template <class V>
INLINE auto sum_lanes(V v) {
    return fold_lanes(v, [](auto a, auto b) { return a + b; });
}

template <class V>
INLINE auto max_lanes(V v) {
    return fold_lanes(v, [](auto a, auto b) { return a > b ? a : b; });
}

// The sums over lanes of four vectors, in whichever order takes the fewest steps; each is what it would be beside
// any other three.
INLINE void sum_lanes4(const Vec* v, float* to) {
    // Instead of vhaddps, which takes more steps: lanes 0 and 2, 1 and 3, of each 128 bits, then both.
#if defined(__AVX512F__)
    auto pairs = [](Vec a, Vec b) {
        __m512 low = _mm512_unpacklo_ps((__m512)a, (__m512)b), high = _mm512_unpackhi_ps((__m512)a, (__m512)b);
        return _mm512_castps_pd(_mm512_add_ps(low, high));
    };
    __m512d first = pairs(v[0], v[1]), second = pairs(v[2], v[3]);
    __m512d low = _mm512_unpacklo_pd(first, second), high = _mm512_unpackhi_pd(first, second);
    __m512 both = _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
    __m256 fours = _mm256_add_ps(_mm512_castps512_ps256(both), _mm512_extractf32x8_ps(both, 1));
    _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(fours), _mm256_extractf128_ps(fours, 1)));
#elif defined(__AVX2__)
    auto pairs = [](Vec a, Vec b) {
        __m256 low = _mm256_unpacklo_ps((__m256)a, (__m256)b), high = _mm256_unpackhi_ps((__m256)a, (__m256)b);
        return (__m256d)_mm256_add_ps(low, high);
    };
    __m256d first = pairs(v[0], v[1]), second = pairs(v[2], v[3]);
    __m256 fours = _mm256_add_ps((__m256)_mm256_unpacklo_pd(first, second), (__m256)_mm256_unpackhi_pd(first, second));
    _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(fours), _mm256_extractf128_ps(fours, 1)));
#else
    for (int i = 0; i < 4; ++i) to[i] = sum_lanes(v[i]);
#endif
}

// Whether a comparison holds in any lane.
INLINE bool any(VecInt is_true) {
#if defined(__AVX512F__)
    return _mm512_movepi32_mask((__m512i)is_true) != 0;
#elif defined(__AVX2__)
    return _mm256_movemask_ps((__m256)is_true) != 0;
#else
    int32_t lanes = 0;
    for (int i = 0; i < kLanes; ++i) lanes |= is_true[i];
    return lanes != 0;
#endif
}

constexpr float kRoundingShift = 12582912.0f;  // 1.5 * 2^23: adding it leaves an integer in the low bits
constexpr int32_t kRoundingShiftBits = 0x4B400000;

// Nearest integers, ties to even, of |v| < 2^22.
INLINE VecInt round_to_int(Vec v) {
    Vec shifted = v + kRoundingShift;
    VecInt bits;
    std::memcpy(&bits, &shifted, sizeof bits);
    return bits - kRoundingShiftBits;
}

// e^v within 2 ulp; exactly 0 below -87, so that a masked score has no weight at all. Range reduction
// by ln 2 in two parts, and the polynomial of Cephes' expf (Moshier).
INLINE Vec exp(Vec v) {
    Vec clamped = v > 88.0f ? broadcast(88.0f) : v;
    VecInt is_zero = clamped < -87.0f;
    clamped = is_zero ? broadcast(0.0f) : clamped;
    Vec n = (clamped * 1.44269504088896341f + kRoundingShift) - kRoundingShift;
    Vec r = fma(n, broadcast(-0.693359375f), clamped);
    r = fma(n, broadcast(2.12194440e-4f), r);
    Vec p = broadcast(1.9875691500e-4f);
    p = fma(p, r, broadcast(1.3981999507e-3f));
    p = fma(p, r, broadcast(8.3334519073e-3f));
    p = fma(p, r, broadcast(4.1665795894e-2f));
    p = fma(p, r, broadcast(1.6666665459e-1f));
    p = fma(p, r, broadcast(5.0000001201e-1f));
    p = fma(p, r * r, r + 1.0f);
    VecInt exponent = (round_to_int(n) + 127) << 23;
    Vec power;
    std::memcpy(&power, &exponent, sizeof power);
    return is_zero ? broadcast(0.0f) : p * power;
}

INLINE float exp(float x) { return exp(broadcast(x))[0]; }

// Storage types of the KV cache.

struct Half {
    uint16_t bits;
};

struct BFloat {
    uint16_t bits;
};

INLINE float as_float(uint32_t bits) {
    float f;
    std::memcpy(&f, &bits, sizeof f);
    return f;
}

INLINE uint32_t as_bits(float f) {
    uint32_t bits;
    std::memcpy(&bits, &f, sizeof bits);
    return bits;
}

INLINE float to_float(float x) { return x; }

INLINE float to_float(BFloat x) { return as_float(uint32_t(x.bits) << 16); }

INLINE float to_float(Half x) {
#if defined(__AVX2__)
    return _cvtsh_ss(x.bits);
#else
    uint32_t sign = uint32_t(x.bits & 0x8000) << 16, magnitude = uint32_t(x.bits & 0x7FFF) << 13;
    if (magnitude >= 0x0F800000) return as_float(sign | 0x70000000 | magnitude);  // infinity, NaN
    return as_float(sign | as_bits(as_float(magnitude) * 0x1p112f));  // re-biased; subnormals too
#endif
}

INLINE void from_float(float x, float* to) { *to = x; }

INLINE void from_float(float x, BFloat* to) {
    uint32_t bits = as_bits(x);
    bool is_nan = (bits & 0x7FFFFFFF) > 0x7F800000;
    to->bits = is_nan ? uint16_t(bits >> 16 | 0x40) : uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

INLINE void from_float(float x, Half* to) {
#if defined(__AVX2__)
    to->bits = uint16_t(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT));
#else
    uint32_t bits = as_bits(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7FFFFFFF;
    uint32_t half;
    if (magnitude > 0x7F800000) {
        half = 0x7E00;  // NaN
    } else if (magnitude >= 0x477FF000) {
        half = 0x7C00;  // rounds to 2^16 or more: infinity
    } else if (magnitude < 0x38800000) {
        half = as_bits(as_float(magnitude) + 0.5f) - as_bits(0.5f);  // subnormal: 0.5's ulp is 2^-24
    } else {
        half = (magnitude - 0x38000000 + 0xFFF + (magnitude >> 13 & 1)) >> 13;
    }
    to->bits = uint16_t(sign | half);
#endif
}

// One vector from storage.
INLINE Vec load(const Half* from) {
#if defined(__AVX512F__)
    return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from));
#elif defined(__AVX2__)
    return (Vec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from));
#else
    Vec v;
    for (int i = 0; i < kLanes; ++i) v[i] = to_float(from[i]);
    return v;
#endif
}

INLINE Vec load(const BFloat* from) {
    typedef uint16_t Bits __attribute__((vector_size(kLanes * 2)));
    Bits bits;
    std::memcpy(&bits, from, sizeof bits);
    VecInt wide = __builtin_convertvector(bits, VecInt) << 16;
    Vec v;
    std::memcpy(&v, &wide, sizeof v);
    return v;
}

// Eight floats to storage.
template <class T>
INLINE void store8(const float* from, T* to) {
    for (int i = 0; i < 8; ++i) from_float(from[i], to + i);
}

#if defined(__AVX2__)
template <>
INLINE void store8(const float* from, Half* to) {
    _mm_storeu_si128((__m128i*)to, _mm256_cvtps_ph(_mm256_loadu_ps(from), _MM_FROUND_TO_NEAREST_INT));
}
#endif

}  // namespace minivllm::ISA
