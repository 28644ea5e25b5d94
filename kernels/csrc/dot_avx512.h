// Tiles with AVX-512 VNNI: vpdpbusd multiplies u8 by s8 and adds four products to an int32, without saturation.
// Weights of 8 bits are multiplied as 0..255, and sums begin with what that is too much.
//
// A tile of 12 tokens has as many sums in integers, and in floats, as leave registers for the rest.
#pragma once

#include "dot.h"

namespace minivllm::ISA {

template <int Bits>
constexpr int kUnpackedBytes = kPanel * kGroup + kScaleBytes;

// Quad k of a packed group's weights.
template <int Bits>
INLINE __m512i load_weights(const uint8_t* block, int k) {
    if (Bits == 8) return _mm512_loadu_si512(block + k * 64);
    __m512i both = _mm512_loadu_si512(block + k % 4 * 64);
    return _mm512_and_si512(k < 4 ? both : _mm512_srli_epi16(both, 4), _mm512_set1_epi8(0x0F));
}

template <int Bits>
INLINE void unpack(const uint8_t* block, uint8_t* to) {
    UNROLL for (int k = 0; k < 8; ++k) _mm512_storeu_si512(to + k * 64, load_weights<Bits>(block, k));
    unpack_scales<Bits>(block, to + 8 * 64);
}

// f += the products of N tokens and one group: quad k of its weights is weights(k).
template <int Bits, int N, class Weights>
INLINE void add_group(const TileActivations<Bits>& a, int64_t group, Weights weights, __m512 d, __m512 m,
                      __m512 (&f)[N]) {
    const int8_t* x = a.values + group * N * kGroup;
    __m512i sums[N];
    UNROLL for (int t = 0; t < N; ++t)
        sums[t] = Bits == 4 ? _mm512_setzero_si512() : _mm512_set1_epi32(a.of(t, group).offsets[t % kStrip]);
    UNROLL for (int k = 0; k < 8; ++k) {
        __m512i w = weights(k);
        UNROLL for (int t = 0; t < N; ++t)
            // Written out, because compilers load and broadcast in an instruction of its own.
            asm("vpdpbusd %2%{1to16%}, %1, %0"
                : "+v"(sums[t])
                : "v"(w), "m"(*(const int32_t*)(x + t * kGroup + k * 4)));
    }
    UNROLL for (int t = 0; t < N; ++t) {
        const Numbers& numbers = a.of(t, group);
        __m512 factor = _mm512_mul_ps(d, _mm512_set1_ps(numbers.scales[t % kStrip]));
        f[t] = _mm512_fmadd_ps(factor, _mm512_cvtepi32_ps(sums[t]), f[t]);
        if (Bits == 4) f[t] = _mm512_fmadd_ps(m, _mm512_set1_ps(numbers.scaled_sums[t % kStrip]), f[t]);
    }
}

// (Functions by themselves: between others compilers run out of registers.)
template <int Bits, int N>
NOINLINE void tile(const uint8_t* weights, TileActivations<Bits> a, int64_t num_groups, bool adds, float* out) {
    __m512 f[N];
    UNROLL for (int t = 0; t < N; ++t) f[t] = adds ? _mm512_loadu_ps(out + t * kPanel) : _mm512_setzero_ps();
    for (int64_t g = 0; g < num_groups; ++g, weights += kUnpackedBytes<Bits>) {
        auto quad = [&](int k) { return _mm512_loadu_si512(weights + k * 64); };
        const uint8_t* scales = weights + 8 * 64;
        add_group<Bits>(a, g, quad, _mm512_loadu_ps(scales), _mm512_loadu_ps(scales + 64), f);
    }
    UNROLL for (int t = 0; t < N; ++t) _mm512_storeu_ps(out + t * kPanel, f[t]);
}

template <int Bits, int N>
NOINLINE void tile_packed(const uint8_t* blocks, TileActivations<Bits> a, int64_t num_groups, float* out) {
    __m512 f[N] = {};
    for (int64_t g = 0; g < num_groups; ++g, blocks += kBlockBytes<Bits>) {
        prefetch_ahead<Bits>(blocks);
        const __m256i* numbers = (const __m256i*)(blocks + kValueBytes<Bits>);
        __m512 d = _mm512_cvtph_ps(_mm256_loadu_si256(numbers));
        __m512 m = Bits == 4 ? _mm512_cvtph_ps(_mm256_loadu_si256(numbers + 1)) : d;
        add_group<Bits>(a, g, [&](int k) { return load_weights<Bits>(blocks, k); }, d, m, f);
    }
    UNROLL for (int t = 0; t < N; ++t) _mm512_storeu_ps(out + t * kPanel, f[t]);
}

}  // namespace minivllm::ISA
