// The integer heart of a product with packed weights: a tile of a few tokens times one panel of 16 rows.
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
// For each instruction set there are
//
//   Value<Bits>                 what activations are rounded to beside weights of so many bits
//   kTileTokens                 the most tokens that a tile has, a multiple of kStrip
//   kUnpackedBytes<Bits>        of a group's weights, as tile() wants them
//   unpack<Bits>(block, to)     a packed group's weights in that form
//   store_group(values, to)     32 integers as a group of activations
//   tile<Bits, N>(weights, scales, a, num_groups, out)
//                               out [N, 16] += N tokens times some groups of unpacked weights; scales has d and m
//                               of each group, 16 floats each
//   tile_packed<Bits, N>(blocks, a, num_groups, out)
//                               out [N, 16] = the same, straight from the blocks: for a product of one tile, which
//                               reads them once
#pragma once

#include <type_traits>

#include "simd.h"

namespace minivllm::ISA {

constexpr int kPanel = 16;  // rows
constexpr int kGroup = 32;  // columns
template <int Bits>
constexpr int kValueBytes = kPanel * kGroup * Bits / 8;  // of a packed group
// Values, and d or d and m of the rows in float16.
template <int Bits>
constexpr int kBlockBytes = kValueBytes<Bits> + (Bits == 4 ? 2 : 1) * kPanel * 2;

#if defined(__AVX512VNNI__)
constexpr int kStrip = 4, kTileTokens = 12;
template <int Bits>
using Value = int8_t;
#elif defined(__AVX2__)
constexpr int kStrip = 5, kTileTokens = 5;
template <int Bits>
using Value = std::conditional_t<Bits == 4, int8_t, int16_t>;
#else
constexpr int kStrip = 1, kTileTokens = 1;
template <int Bits>
using Value = std::conditional_t<Bits == 4, int8_t, int16_t>;
#endif

// What belongs to a group of each token of a strip.
struct Numbers {
    float scales[kStrip];
    float scaled_sums[kStrip];  // scale * sum of the values
    int32_t sums[kStrip];       // sum of the values
};

// A step's activations, quantised by token and group, where tiles look for them: values tile by tile, of each its
// groups, of a group its tokens; numbers strip by strip, of each its groups. A strip is some tokens that one thread
// quantises, so that threads don't write next to each other; a tile is some strips.
template <int Bits>
struct Activations {
    Value<Bits>* values;
    Numbers* numbers;
    int64_t groups, tokens;
    int64_t num_strips = (tokens + kStrip - 1) / kStrip;
    int64_t num_tiles = (num_strips * kStrip + kTileTokens - 1) / kTileTokens;

    // Tiles have the same number of strips, or one less. The last strip may be short of tokens.
    int64_t tile_begin(int64_t tile) const {
        const int64_t token = tile * num_strips / num_tiles * kStrip;
        return token < tokens ? token : tokens;
    }
    int64_t tile_of(int64_t token) const { return ((token / kStrip + 1) * num_tiles - 1) / num_strips; }
};

// The part of them that a tile reads, from one of its groups on.
template <int Bits>
struct TileActivations {
    const Value<Bits>* values;  // [groups, tokens of the tile, 32]
    const Numbers* numbers;     // [strips, groups of a row]
    int64_t groups;             // of a row

    TileActivations(const Activations<Bits>& all, int64_t tile, int64_t group) : groups(all.groups) {
        const int64_t begin = all.tile_begin(tile), count = all.tile_begin(tile + 1) - begin;
        values = all.values + (begin * groups + group * count) * kGroup;
        numbers = all.numbers + begin / kStrip * groups + group;
    }

    const Numbers& of(int64_t token, int64_t group) const { return numbers[token / kStrip * groups + group]; }
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

// The scales of a block, d and m, as floats.
template <int Bits>
INLINE void load_scales(const uint8_t* block, float* to) {
    const Half* from = (const Half*)(block + kValueBytes<Bits>);
    for (int i = 0; i < (Bits == 4 ? 2 : 1) * kPanel; i += kLanes) store(to + i, load(from + i));
}

// All of a loop of a fixed count, and its sums kept in registers in the order that is written: GCC would
// otherwise regroup the sum into a tree, keep all products until then, and run out of registers.
#if defined(__clang__)
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif
#define KEEP(x) asm("" : "+v"(x))

}  // namespace minivllm::ISA

#if defined(__AVX512VNNI__)
#include "dot_avx512.h"
#elif defined(__AVX2__)
#include "dot_avx2.h"
#else
#include "dot_portable.h"
#endif
