// Tiles with AVX2. Its vpmaddubsw multiplies u8 by s8 and adds pairs into an int16 that saturates. Beside 4 bits a
// pair is at most 2 * 15 * 127 = 3810, so that the eight pairs of a group fit (30480): one instruction
// multiplies, one adds, and widening to int32 is needed once a group instead of every time. Beside 8 bits a
// pair wouldn't fit; there vpmaddwd multiplies 16 bits by 16 bits and adds pairs into an int32, which takes
// as many instructions as vpmaddubsw and the widening together would.
#pragma once

#include "dot.h"

namespace minivllm::ISA {

template <int Bits>
constexpr int kUnpackedBytes = kPanel * kGroup * (Bits == 4 ? 1 : 2) + kScaleBytes;

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
    unpack_scales<Bits>(block, to + kUnpackedBytes<Bits> - kScaleBytes);
}

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
INLINE __m256 scale(__m256i sums, __m256 d, __m256 m, const Numbers& numbers, int t, __m256 f) {
    if (Bits == 4) sums = _mm256_madd_epi16(sums, _mm256_set1_epi16(1));
    __m256 factor = _mm256_mul_ps(d, _mm256_set1_ps(numbers.scales[t]));
    f = _mm256_fmadd_ps(factor, _mm256_cvtepi32_ps(sums), f);
    return Bits == 4 ? _mm256_fmadd_ps(m, _mm256_set1_ps(numbers.scaled_sums[t]), f) : f;
}

template <int Bits, int N>
INLINE void tile(const uint8_t* weights, TileActivations<Bits> a, int64_t num_groups, bool adds, float* out) {
    constexpr int kSteps = (kUnpackedBytes<Bits> - kScaleBytes) / 64, kWidth = kGroup / kSteps;
    __m256 f[N][2];  // weight rows 0 to 7, and 8 to 15
    UNROLL for (int t = 0; t < N; ++t)
        UNROLL for (int half = 0; half < 2; ++half) 
            f[t][half] = adds ? _mm256_loadu_ps(out + t * kPanel + half * 8) : _mm256_setzero_ps();
    for (int64_t g = 0; g < num_groups; ++g, a.values += N * kGroup, weights += kUnpackedBytes<Bits>) {
        __m256i sums[N][2];
        UNROLL for (int k = 0; k < kSteps; ++k) {
            __m256i w0 = load_bytes(weights + k * 64), w1 = load_bytes(weights + k * 64 + 32);
            UNROLL for (int t = 0; t < N; ++t) {
                const Value<Bits>* x = a.values + t * kGroup + k * kWidth;
                __m256i p0 = product(w0, x), p1 = product(w1, x);
                sums[t][0] = k == 0 ? p0 : add<Bits>(sums[t][0], p0);
                sums[t][1] = k == 0 ? p1 : add<Bits>(sums[t][1], p1);
                KEEP(sums[t][0]);
                KEEP(sums[t][1]);
            }
        }
        const float* scales = (const float*)(weights + kSteps * 64);
        UNROLL for (int t = 0; t < N; ++t)
            UNROLL for (int half = 0; half < 2; ++half) {
                __m256 d = _mm256_loadu_ps(scales + half * 8), m = _mm256_loadu_ps(scales + kPanel + half * 8);
                f[t][half] = scale<Bits>(sums[t][half], d, m, a.numbers[g], t, f[t][half]);
            }
    }
    UNROLL for (int t = 0; t < N; ++t)
        UNROLL for (int half = 0; half < 2; ++half) _mm256_storeu_ps(out + t * kPanel + half * 8, f[t][half]);
}

// tile from packed blocks, unpacking in registers: for so few tokens that the blocks are read once.
template <int Bits, int N>
INLINE void tile_packed(const uint8_t* blocks, TileActivations<Bits> a, int64_t num_groups, float* out) {
    __m256 f[N][2] = {};
    for (int64_t g = 0; g < num_groups; ++g, a.values += N * kGroup, blocks += kBlockBytes<Bits>) {
        prefetch_ahead<Bits>(blocks);
        const uint8_t* numbers = blocks + kValueBytes<Bits>;
        UNROLL for (int half = 0; half < 2; ++half) {
            __m256i sums[N];
            UNROLL for (int k = 0; k < Bits; ++k) {
                __m256i both = load_bytes(blocks + k * 64 + half * 32);
                __m256i w0 = Bits == 4 ? low_nibbles(both) : even_bytes(both);
                __m256i w1 = Bits == 4 ? high_nibbles(both) : odd_bytes(both);
                UNROLL for (int t = 0; t < N; ++t) {
                    const Value<Bits>* from = a.values + t * kGroup + k * 4;
                    __m256i p0 = product(w0, from), p1 = product(w1, from + (Bits == 4 ? 16 : 2));
                    sums[t] = k == 0 ? p0 : add<Bits>(sums[t], p0);
                    sums[t] = add<Bits>(sums[t], p1);
                    KEEP(sums[t]);
                }
            }
            __m256 d = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(numbers + half * 16)));
            __m256 m = Bits == 8 ? d : _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(numbers + 32 + half * 16)));
            UNROLL for (int t = 0; t < N; ++t)
                f[t][half] = scale<Bits>(sums[t], d, m, a.numbers[g], t, f[t][half]);
        }
    }
    for (int t = 0; t < N; ++t)
        for (int half = 0; half < 2; ++half) _mm256_storeu_ps(out + t * kPanel + half * 8, f[t][half]);
}

}  // namespace minivllm::ISA
