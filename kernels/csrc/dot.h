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
// Each instruction set has a file of its own, with kUnpackedBytes and what is declared at the end of this one.
#pragma once

#include <algorithm>
#include <limits>
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

// Tokens: those of a strip are rounded by one thread; a tile has some strips. Beside weights of so many bits, values
// are of this type.
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
    int32_t offsets[kStrip];    // -128 * sum of the values
};

// A group's activations, in the order in which dot products want them.
template <class T>
INLINE void store_group(const VecInt* values, T* to) {
    typedef T Narrow __attribute__((vector_size(kLanes * sizeof(T))));
    for (int i = 0; i < kGroup / kLanes; ++i) {
        Narrow narrow = __builtin_convertvector(values[i], Narrow);
        std::memcpy(to + i * kLanes, &narrow, sizeof narrow);
    }
}

// Of a group. Without their signs, floats' bits are in the floats' order, with NaN above infinity.
INLINE float largest_magnitude(const float* from) {
    VecInt largest = {};
    for (int i = 0; i < kGroup; i += kLanes) {
        VecInt bits;
        std::memcpy(&bits, from + i, sizeof bits);
        bits &= 0x7FFFFFFF;
        largest = bits > largest ? bits : largest;
    }
    return as_float(max_lanes(largest));
}

// Values lie tile by tile, of each its groups, of a group its tokens; numbers strip by strip, of each its groups. A
// strip is some tokens that one thread rounds, so that threads don't write next to each other; a tile is some strips.
template <int Bits>
struct Activations {
    Value<Bits>* values;
    Numbers* numbers;
    int64_t groups, tokens;
    int64_t num_strips = (tokens + kStrip - 1) / kStrip;
    int64_t num_tiles = (num_strips * kStrip + kTileTokens - 1) / kTileTokens;

    Activations(void* values, void* numbers, int64_t groups, int64_t tokens)
        : values(static_cast<Value<Bits>*>(values)),
          numbers(static_cast<Numbers*>(numbers)),
          groups(groups),
          tokens(tokens) {}

    // Bytes for the values and the numbers of at most so many tokens.
    static int64_t value_bytes(int64_t tokens, int64_t groups) {
        return tokens * groups * kGroup * int64_t(sizeof(Value<Bits>));
    }
    static int64_t number_bytes(int64_t tokens, int64_t groups) {
        return (tokens + kStrip - 1) / kStrip * groups * int64_t(sizeof(Numbers));
    }

    // Tiles have the same number of strips, or one less. The last strip may be short of tokens.
    int64_t tile_begin(int64_t tile) const { return std::min(tile * num_strips / num_tiles * kStrip, tokens); }

    // Where a token's groups are written: those from `first` on, one after the other.
    class Row {
       public:
        Row(const Activations& a, int64_t token, int64_t first) : place_(token % kStrip) {
            const int64_t tile = ((token / kStrip + 1) * a.num_tiles - 1) / a.num_strips, begin = a.tile_begin(tile);
            step_ = a.tile_begin(tile + 1) - begin;
            values_ = a.values + (begin * a.groups + first * step_ + token - begin) * kGroup;
            numbers_ = a.numbers + token / kStrip * a.groups + first;
        }

        // 32 floats.
        void write(const float* from) {
            constexpr float kLevels = std::numeric_limits<Value<Bits>>::max();
            const float largest = largest_magnitude(from);
            if (largest <= std::numeric_limits<float>::max()) {
                const float inverse = largest > 1e-30f ? kLevels / largest : 0.0f;  // no inverse overflows
                VecInt rounded[kGroup / kLanes], total = {};
                for (int i = 0; i < kGroup / kLanes; ++i) {
                    rounded[i] = round_to_int(load(from + i * kLanes) * inverse);
                    total += rounded[i];
                }
                store_group(rounded, values_);
                write_numbers(largest / kLevels, sum_lanes(total));
            } else {  // the token's results are NaN, as with floats
                std::fill(values_, values_ + kGroup, Value<Bits>(0));
                write_numbers(std::numeric_limits<float>::quiet_NaN(), 0);
            }
            values_ += step_ * kGroup;
            ++numbers_;
        }

       private:
        void write_numbers(float scale, int32_t sum) {
            numbers_->scales[place_] = scale;
            numbers_->scaled_sums[place_] = scale * float(sum);
            numbers_->offsets[place_] = -128 * sum;
        }

        int64_t place_, step_;
        Value<Bits>* values_;
        Numbers* numbers_;
    };
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

constexpr int kScaleBytes = 2 * kPanel * sizeof(float);

template <int Bits>
INLINE void unpack_scales(const uint8_t* block, uint8_t* to) {
    const Half* from = (const Half*)(block + kValueBytes<Bits>);
    for (int i = 0; i < (Bits == 4 ? 2 : 1) * kPanel; i += kLanes) store((float*)to + i, load(from + i));
}

// run(std::integral_constant<int, count>) for a tile's number of tokens.
template <int N = kTileTokens, class Run>
INLINE void for_count(int64_t count, Run run) {
    if constexpr (N > 1)
        if (count < N) return for_count<N - 1>(count, run);
    run(std::integral_constant<int, N>{});
}

// All of a loop of a fixed count, and its sums kept in registers in the order that is written: GCC would
// otherwise regroup the sum into a tree, keep all products until then, and run out of registers.
#if defined(__clang__)
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

// Asks the memory for what follows a packed group by far enough to be there in time: other panels, if need be.
template <int Bits>
INLINE void prefetch_ahead(const uint8_t* block) {
    constexpr int kDistance = 4096;
    for (int i = 0; i < kBlockBytes<Bits>; i += 64) __builtin_prefetch(block + kDistance + i);
}

// A packed group as tiles want it: values, then d and m of the rows as floats.
template <int Bits>
void unpack(const uint8_t* block, uint8_t* to);

// out [N, 16] = a tile of N tokens times some groups of unpacked weights; added to what is there already, or not.
template <int Bits, int N>
void tile(const uint8_t* weights, TileActivations<Bits> a, int64_t num_groups, bool adds, float* out);

// The same straight from packed groups: for a product of one tile, which reads them once.
template <int Bits, int N>
void tile_packed(const uint8_t* blocks, TileActivations<Bits> a, int64_t num_groups, float* out);

}  // namespace minivllm::ISA

#if defined(__AVX512VNNI__)
#include "dot_avx512.h"
#elif defined(__AVX2__)
#include "dot_avx2.h"
#else
#include "dot_portable.h"
#endif
