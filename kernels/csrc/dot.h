// The integer heart of a product with packed weights: a few tokens times one panel of 16 rows.
//
// Weights of 4 bits are multiplied as 0..15, activations beside them rounded to 8 bits; beside weights of
// 8 bits, -128..127, activations have as many bits as the instruction set takes at no cost: 16, or 8 with
// VNNI. Every group of 32 columns is summed up exactly in integers and then scaled into a float, group
// after group in one order: the result doesn't depend on how many tokens there are.
//
// 4 bits:  out += (d * s) * sum(u * x) + m * (s * sum(x))       d, m of the row; s of the token
// 8 bits:  out += (d * s) * sum(q * x)
//
// A packed group (packed.py) has, four columns at a time, four bytes of each of the 16 rows, so that one
// multiply-add instruction works on many rows at once and no sum over lanes is ever needed.
//
// AVX2's vpmaddubsw multiplies u8 by s8 and adds pairs into an int16 that saturates. Beside 4 bits a pair
// is at most 2 * 15 * 127 = 3810, so that the eight pairs of a group fit (30480): one instruction
// multiplies, one adds, and widening to int32 is needed once a group instead of every time. Beside 8 bits a
// pair wouldn't fit; there vpmaddwd multiplies 16 bits by 16 bits and adds pairs into an int32, which takes
// as many instructions as vpmaddubsw and the widening together would.
#pragma once

#include <type_traits>

#include "simd.h"

namespace minivllm::ISA {

constexpr int kPanel = 16;  // rows
constexpr int kGroup = 32;  // columns
// Values, and d or d and m of the rows in float16.
template <int Bits>
constexpr int kBlockBytes = kPanel * kGroup * Bits / 8 + (Bits == 4 ? 2 : 1) * kPanel * 2;

// Beside weights of so many bits, activations are of this type.
#if defined(__AVX512VNNI__)
template <int Bits>
using Value = int8_t;
#else
template <int Bits>
using Value = std::conditional_t<Bits == 4, int8_t, int16_t>;
#endif

// A step's activations, quantised by token and group: [tokens, groups] and [tokens, groups * 32].
template <int Bits>
struct Activations {
    Value<Bits>* values;
    float* scales;
    float* scaled_sums;  // scale * sum of the group's values
    int32_t* sums;       // sum of the group's values
    int64_t groups;
};

INLINE int32_t load_quad(const int8_t* from) {
    int32_t quad;
    std::memcpy(&quad, from, sizeof quad);
    return quad;
}

INLINE int32_t load_pair(const int16_t* from) {
    int32_t pair;
    std::memcpy(&pair, from, sizeof pair);
    return pair;
}

// A group's activations, in the order in which dot products want them.
template <class T>
INLINE void store_group(const VecInt* values, T* to) {
    typedef T Narrow __attribute__((vector_size(kLanes * sizeof(T))));
    for (int i = 0; i < kGroup / kLanes; ++i) {
        Narrow narrow = __builtin_convertvector(values[i], Narrow);
        std::memcpy(to + i * kLanes, &narrow, sizeof narrow);
    }
}

// All of a loop of a fixed count, and its sums kept in registers in the order that is written: GCC would
// otherwise regroup the sum into a tree, keep all products until then, and run out of registers.
#if defined(__clang__)
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif
#define KEEP(x) asm("" : "+v"(x))
// A pointer that is nothing but itself: GCC would otherwise make one for each place that is read through
// it, keep them all from group to group, and run out of registers.
#define KEEP_POINTER(x) asm("" : "+r"(x))

#if defined(__AVX512VNNI__)

// vpdpbusd multiplies u8 by s8 and adds four products to an int32, without saturation.
constexpr int kTileTokens = 8;
template <int Bits>
constexpr int kUnpackedBytes = kPanel * kGroup;

template <int Bits>
INLINE void unpack(const uint8_t* block, uint8_t* to) {
    const __m512i mask = _mm512_set1_epi8(0x0F);
    for (int k = 0; k < Bits; ++k) {
        __m512i both = _mm512_loadu_si512(block + k * 64);
        if constexpr (Bits == 8) {
            _mm512_storeu_si512(to + k * 64, both);
        } else {
            _mm512_storeu_si512(to + k * 64, _mm512_and_si512(both, mask));
            _mm512_storeu_si512(to + (k + 4) * 64, _mm512_and_si512(_mm512_srli_epi16(both, 4), mask));
        }
    }
}

template <int Bits, int N>
INLINE void tile(const uint8_t* weights, const float* scales, const Activations<Bits> a, int64_t at,
                 int64_t num_groups, float* out) {
    for (int64_t g = 0; g < num_groups; ++g, ++at, weights += kUnpackedBytes<Bits>, scales += 2 * kPanel) {
        const int8_t* x = a.values + at * kGroup;
        __m512i sums[N];
        UNROLL for (int t = 0; t < N; ++t) sums[t] = _mm512_setzero_si512();
        UNROLL for (int k = 0; k < 8; ++k) {
            __m512i w = _mm512_loadu_si512(weights + k * 64);
            UNROLL for (int t = 0; t < N; ++t) {
                __m512i quad = _mm512_set1_epi32(load_quad(x + t * a.groups * kGroup + k * 4));
                sums[t] = _mm512_dpbusd_epi32(sums[t], w, quad);
                KEEP(sums[t]);
            }
        }
        __m512 d = _mm512_loadu_ps(scales), m = _mm512_loadu_ps(scales + kPanel);
        UNROLL for (int t = 0; t < N; ++t) {
            float* to = out + t * kPanel;
            const int64_t group = at + t * a.groups;
            if (Bits == 8)  // weights were 128 too large
                sums[t] = _mm512_sub_epi32(sums[t], _mm512_set1_epi32(128 * a.sums[group]));
            __m512 factor = _mm512_mul_ps(d, _mm512_set1_ps(a.scales[group]));
            __m512 f = _mm512_fmadd_ps(factor, _mm512_cvtepi32_ps(sums[t]), _mm512_loadu_ps(to));
            if (Bits == 4) f = _mm512_fmadd_ps(m, _mm512_set1_ps(a.scaled_sums[group]), f);
            _mm512_storeu_ps(to, f);
        }
    }
}

#elif defined(__AVX2__)

constexpr int kTileTokens = 5;
template <int Bits>
constexpr int kUnpackedBytes = kPanel * kGroup * (Bits == 4 ? 1 : 2);

// Packing works within the halves of a vector: the order of fours is mended at the end.
template <>
INLINE void store_group(const VecInt* values, int8_t* to) {
    const __m256i* v = (const __m256i*)values;
    __m256i packed = _mm256_packs_epi16(_mm256_packs_epi32(v[0], v[1]), _mm256_packs_epi32(v[2], v[3]));
    packed = _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    _mm256_storeu_si256((__m256i*)to, packed);
}

// 16-bit activations go in the order 0 2 1 3: the even bytes of a quad, then the odd ones, become 16 bits
// by a mask and a shift.
template <>
INLINE void store_group(const VecInt* values, int16_t* to) {
    for (int i = 0; i < kGroup / kLanes; ++i) {
        __m256i v = _mm256_shuffle_epi32((__m256i)values[i], _MM_SHUFFLE(3, 1, 2, 0));
        __m128i packed = _mm_packs_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
        _mm_storeu_si128((__m128i*)(to + i * kLanes), packed);
    }
}

INLINE __m256i load_bytes(const uint8_t* from) { return _mm256_loadu_si256((const __m256i*)from); }

INLINE void store_bytes(uint8_t* to, __m256i v) { _mm256_storeu_si256((__m256i*)to, v); }

INLINE __m256i low_nibbles(__m256i v) { return _mm256_and_si256(v, _mm256_set1_epi8(0x0F)); }

INLINE __m256i high_nibbles(__m256i v) { return low_nibbles(_mm256_srli_epi16(v, 4)); }

INLINE __m256i even_bytes(__m256i v) {
    return _mm256_sub_epi16(_mm256_and_si256(v, _mm256_set1_epi16(0xFF)), _mm256_set1_epi16(128));
}

INLINE __m256i odd_bytes(__m256i v) { return _mm256_sub_epi16(_mm256_srli_epi16(v, 8), _mm256_set1_epi16(128)); }

// 4 bits: [8 quads][16 rows][4] bytes. 8 bits: [16 pairs][16 rows][2] of 16 bits.
template <int Bits>
INLINE void unpack(const uint8_t* block, uint8_t* to) {
    for (int i = 0; i < 2 * Bits; ++i) {
        __m256i v = load_bytes(block + i * 32);
        if constexpr (Bits == 4) {
            store_bytes(to + i * 32, low_nibbles(v));
            store_bytes(to + 256 + i * 32, high_nibbles(v));
        } else {
            uint8_t* quad = to + i / 2 * 128 + i % 2 * 32;
            store_bytes(quad, even_bytes(v));
            store_bytes(quad + 64, odd_bytes(v));
        }
    }
}

// The products of one vector of weights and the activations that it meets: pairs in int16 beside 4 bits,
// int32 beside 8.
INLINE __m256i product(__m256i w, const int8_t* x) { return _mm256_maddubs_epi16(w, _mm256_set1_epi32(load_quad(x))); }

INLINE __m256i product(__m256i w, const int16_t* x) { return _mm256_madd_epi16(w, _mm256_set1_epi32(load_pair(x))); }

template <int Bits>
INLINE __m256i add(__m256i x, __m256i y) {
    return Bits == 4 ? _mm256_add_epi16(x, y) : _mm256_add_epi32(x, y);
}

// f + (d * s) * sum + m * (s * sum(x)) for eight rows; m for 4 bits only.
template <int Bits>
INLINE __m256 scale(__m256i sums, __m256 d, __m256 m, const Activations<Bits>& a, int64_t group, __m256 f) {
    if (Bits == 4) sums = _mm256_madd_epi16(sums, _mm256_set1_epi16(1));
    __m256 factor = _mm256_mul_ps(d, _mm256_set1_ps(a.scales[group]));
    f = _mm256_fmadd_ps(factor, _mm256_cvtepi32_ps(sums), f);
    return Bits == 4 ? _mm256_fmadd_ps(m, _mm256_set1_ps(a.scaled_sums[group]), f) : f;
}

// Where each of N tokens has its values of one group.
template <int Bits, int N>
INLINE void find_rows(const Activations<Bits>& a, int64_t at, const Value<Bits>* (&rows)[N]) {
    UNROLL for (int t = 0; t < N; ++t) {
        rows[t] = a.values + (at + t * a.groups) * kGroup;
        KEEP_POINTER(rows[t]);
    }
}

template <int Bits, int N>
INLINE void tile(const uint8_t* weights, const float* scales, const Activations<Bits> a, int64_t at,
                 int64_t num_groups, float* out) {
    constexpr int kSteps = kUnpackedBytes<Bits> / 64, kWidth = kGroup / kSteps;
    __m256 f[N][2];  // weight rows 0 to 7, and 8 to 15
    UNROLL for (int t = 0; t < N; ++t)
        UNROLL for (int half = 0; half < 2; ++half) f[t][half] = _mm256_loadu_ps(out + t * kPanel + half * 8);
    for (int64_t g = 0; g < num_groups; ++g, ++at, weights += kUnpackedBytes<Bits>, scales += 2 * kPanel) {
        const Value<Bits>* rows[N];
        find_rows(a, at, rows);
        __m256i sums[N][2];
        UNROLL for (int k = 0; k < kSteps; ++k) {
            __m256i w0 = load_bytes(weights + k * 64), w1 = load_bytes(weights + k * 64 + 32);
            UNROLL for (int t = 0; t < N; ++t) {
                __m256i p0 = product(w0, rows[t] + k * kWidth), p1 = product(w1, rows[t] + k * kWidth);
                sums[t][0] = k == 0 ? p0 : add<Bits>(sums[t][0], p0);
                sums[t][1] = k == 0 ? p1 : add<Bits>(sums[t][1], p1);
                KEEP(sums[t][0]);
                KEEP(sums[t][1]);
            }
        }
        UNROLL for (int t = 0; t < N; ++t)
            UNROLL for (int half = 0; half < 2; ++half) {
                __m256 d = _mm256_loadu_ps(scales + half * 8), m = _mm256_loadu_ps(scales + kPanel + half * 8);
                f[t][half] = scale<Bits>(sums[t][half], d, m, a, at + t * a.groups, f[t][half]);
            }
    }
    UNROLL for (int t = 0; t < N; ++t)
        UNROLL for (int half = 0; half < 2; ++half) _mm256_storeu_ps(out + t * kPanel + half * 8, f[t][half]);
}

// tile from packed blocks, unpacking in registers: for so few tokens that the blocks are read once.
template <int Bits, int N>
INLINE void tile_packed(const uint8_t* blocks, const Activations<Bits> a, int64_t at, int64_t num_groups, float* out) {
    __m256 f[N][2] = {};
    for (int64_t g = 0; g < num_groups; ++g, ++at, blocks += kBlockBytes<Bits>) {
        const Value<Bits>* rows[N];
        find_rows(a, at, rows);
        const uint8_t* numbers = blocks + kPanel * kGroup * Bits / 8;
        UNROLL for (int half = 0; half < 2; ++half) {
            __m256i sums[N];
            UNROLL for (int k = 0; k < Bits; ++k) {
                __m256i both = load_bytes(blocks + k * 64 + half * 32);
                __m256i w0 = Bits == 4 ? low_nibbles(both) : even_bytes(both);
                __m256i w1 = Bits == 4 ? high_nibbles(both) : odd_bytes(both);
                UNROLL for (int t = 0; t < N; ++t) {
                    const Value<Bits>* from = rows[t] + k * 4;
                    __m256i p0 = product(w0, from), p1 = product(w1, from + (Bits == 4 ? 16 : 2));
                    sums[t] = k == 0 ? p0 : add<Bits>(sums[t], p0);
                    sums[t] = add<Bits>(sums[t], p1);
                    KEEP(sums[t]);
                }
            }
            __m256 d = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(numbers + half * 16)));
            __m256 m = Bits == 8 ? d : _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(numbers + 32 + half * 16)));
            UNROLL for (int t = 0; t < N; ++t)
                f[t][half] = scale<Bits>(sums[t], d, m, a, at + t * a.groups, f[t][half]);
        }
    }
    for (int t = 0; t < N; ++t)
        for (int half = 0; half < 2; ++half) _mm256_storeu_ps(out + t * kPanel + half * 8, f[t][half]);
}

#else

constexpr int kTileTokens = 1;
template <int Bits>
constexpr int kUnpackedBytes = kPanel * kGroup;

template <int Bits>
INLINE void unpack(const uint8_t* block, uint8_t* to) {
    for (int i = 0; i < 64 * Bits; ++i) {
        to[i] = Bits == 8 ? block[i] : block[i] & 0x0F;
        if (Bits == 4) to[256 + i] = block[i] >> 4;
    }
}

template <int Bits, int N>
INLINE void tile(const uint8_t* weights, const float* scales, const Activations<Bits> a, int64_t at,
                 int64_t num_groups, float* out) {
    static_assert(N == 1, "one token at a time");
    for (int64_t g = 0; g < num_groups; ++g, ++at, weights += kUnpackedBytes<Bits>, scales += 2 * kPanel) {
        int32_t sums[kPanel] = {};
        for (int k = 0; k < 8; ++k)
            for (int row = 0; row < kPanel; ++row)
                for (int i = 0; i < 4; ++i) {
                    int32_t weight = weights[k * 64 + row * 4 + i];
                    sums[row] += (Bits == 4 ? weight : weight - 128) * a.values[at * kGroup + k * 4 + i];
                }
        for (int row = 0; row < kPanel; ++row) {
            out[row] += scales[row] * a.scales[at] * float(sums[row]);
            if (Bits == 4) out[row] += scales[kPanel + row] * a.scaled_sums[at];
        }
    }
}

#endif

// The scales of a block, d and m, as floats.
template <int Bits>
INLINE void load_scales(const uint8_t* block, float* to) {
    const Half* from = (const Half*)(block + kPanel * kGroup * Bits / 8);
    for (int i = 0; i < (Bits == 4 ? 2 : 1) * kPanel; i += kLanes) store(to + i, load(from + i));
}

#if !defined(__AVX2__) || defined(__AVX512VNNI__)
// tile from packed blocks.
template <int Bits, int N>
INLINE void tile_packed(const uint8_t* blocks, const Activations<Bits> a, int64_t at, int64_t num_groups, float* out) {
    alignas(64) uint8_t weights[kUnpackedBytes<Bits>];
    float scales[2 * kPanel];
    for (int i = 0; i < N * kPanel; ++i) out[i] = 0.0f;
    for (int64_t g = 0; g < num_groups; ++g) {
        const uint8_t* block = blocks + g * kBlockBytes<Bits>;
        unpack<Bits>(block, weights);
        load_scales<Bits>(block, scales);
        tile<Bits, N>(weights, scales, a, at + g, 1, out);
    }
}
#endif

}  // namespace minivllm::ISA
