// Tiles for any CPU: plain loops, one token at a time.
#pragma once

#include "dot.h"

namespace minivllm::ISA {

template <int Bits>
constexpr int kUnpackedBytes = kPanel * kGroup + kScaleBytes;

template <int Bits>
INLINE void unpack(const uint8_t* block, uint8_t* to) {
    for (int i = 0; i < 64 * Bits; ++i) {
        to[i] = Bits == 8 ? block[i] : block[i] & 0x0F;
        if (Bits == 4) to[256 + i] = block[i] >> 4;
    }
    unpack_scales<Bits>(block, to + kPanel * kGroup);
}

template <int Bits, int N>
INLINE void tile(const uint8_t* weights, TileActivations<Bits> a, int64_t num_groups, bool adds, float* out) {
    static_assert(N == 1, "one token at a time");
    if (!adds) std::fill(out, out + kPanel, 0.0f);
    for (int64_t g = 0; g < num_groups; ++g, weights += kUnpackedBytes<Bits>) {
        int32_t sums[kPanel] = {};
        for (int k = 0; k < 8; ++k)
            for (int row = 0; row < kPanel; ++row)
                for (int i = 0; i < 4; ++i) {
                    int32_t weight = weights[k * 64 + row * 4 + i];
                    sums[row] += (Bits == 4 ? weight : weight - 128) * a.values[g * kGroup + k * 4 + i];
                }
        const float* scales = (const float*)(weights + kPanel * kGroup);
        for (int row = 0; row < kPanel; ++row) {
            out[row] += scales[row] * a.numbers[g].scales[0] * float(sums[row]);
            if (Bits == 4) out[row] += scales[kPanel + row] * a.numbers[g].scaled_sums[0];
        }
    }
}

template <int Bits, int N>
INLINE void tile_packed(const uint8_t* blocks, TileActivations<Bits> a, int64_t num_groups, float* out) {
    alignas(float) uint8_t weights[kUnpackedBytes<Bits>];
    for (int64_t g = 0; g < num_groups; ++g) {
        const uint8_t* block = blocks + g * kBlockBytes<Bits>;
        unpack<Bits>(block, weights);
        tile<Bits, N>(weights, a, 1, g > 0, out);
        a.values += kGroup;
        ++a.numbers;
    }
}

}  // namespace minivllm::ISA
