// x @ weight.T with packed weights of 4 or 8 bits and activations quantised on the fly, and what
// comes just before such a product, fused with the quantisation.

#include <algorithm>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include "dot.h"
#include "elementwise.h"
#include "kernels.h"
#include "parts.h"

namespace minivllm::ISA {

namespace {

constexpr int64_t kBlockGroups = 16;   // groups that are unpacked at once: they stay in the L1 cache
constexpr int64_t kBlockTokens = 128;  // tokens that pass over them: their activations stay in L2
constexpr int64_t kTokensAtATime = 4;  // that a thread quantises

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

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

// One token's row to integers, group by group; columns past the row's end are zero.
template <class T>
void quantize_row(const float* x, int64_t columns, int64_t groups, T* values, float* scales, float* scaled_sums,
                  int32_t* sums) {
    const float levels = std::numeric_limits<T>::max();
    for (int64_t g = 0; g < groups; ++g) {
        const float* from = x + g * kGroup;
        float padded[kGroup];
        if ((g + 1) * kGroup > columns) {
            for (int i = 0; i < kGroup; ++i) padded[i] = g * kGroup + i < columns ? from[i] : 0.0f;
            from = padded;
        }
        float amax = largest_magnitude(from);
        if (!(amax <= std::numeric_limits<float>::max())) {  // the token's results are NaN, as with floats
            std::fill(values + g * kGroup, values + (g + 1) * kGroup, T(0));
            scales[g] = scaled_sums[g] = std::numeric_limits<float>::quiet_NaN();
            sums[g] = 0;
            continue;
        }
        float inverse = amax > 1e-30f ? levels / amax : 0.0f;  // what is less is zero: no inverse overflows
        VecInt rounded[kGroup / kLanes], total = {};
        for (int i = 0; i < kGroup / kLanes; ++i) {
            rounded[i] = round_to_int(load(from + i * kLanes) * inverse);
            total += rounded[i];
        }
        store_group(rounded, values + g * kGroup);
        const int32_t sum = sum_lanes(total);
        scales[g] = amax / levels;
        scaled_sums[g] = scales[g] * float(sum);
        sums[g] = sum;
    }
}

// tile(std::integral_constant<int, N>, first token) for the tokens [begin, end), N at a time.
template <int N = kTileTokens, class Tile>
void for_tokens(int64_t begin, int64_t end, Tile tile) {
    for (; begin + N <= end; begin += N) tile(std::integral_constant<int, N>{}, begin);
    if constexpr (N > 1) for_tokens<N - 1>(begin, end, tile);
}

// One panel of 16 rows times the tokens [begin, end). It is unpacked once for all of them.
template <int Bits>
void multiply_panel(const uint8_t* panel, const Activations<Bits>& a, int64_t begin, int64_t end, float* sums) {
    if (end - begin <= kTileTokens) {
        for_tokens(begin, end, [&](auto n, int64_t token) {
            tile_packed<Bits, n()>(panel, a, token * a.groups, a.groups, sums + (token - begin) * kPanel);
        });
        return;
    }
    std::fill(sums, sums + (end - begin) * kPanel, 0.0f);
    alignas(64) uint8_t weights[kBlockGroups * kUnpackedBytes<Bits>];
    alignas(64) float scales[kBlockGroups * 2 * kPanel];
    const int64_t step = ceil_div(a.groups, ceil_div(a.groups, kBlockGroups));
    for (int64_t first = 0; first < a.groups; first += step) {
        const int64_t count = std::min(step, a.groups - first);
        for (int64_t g = 0; g < count; ++g) {
            const uint8_t* block = panel + (first + g) * kBlockBytes<Bits>;
            unpack<Bits>(block, weights + g * kUnpackedBytes<Bits>);
            load_scales<Bits>(block, scales + g * 2 * kPanel);
        }
        // The panel that comes next in memory is most likely this thread's next one, too. It is asked for a
        // little at a time while this one's tokens are computed.
        const int64_t bytes = count * kBlockBytes<Bits>, share = ceil_div(bytes, end - begin) / 64 * 64 + 64;
        const uint8_t* next = panel + a.groups * kBlockBytes<Bits> + first * kBlockBytes<Bits>;
        for_tokens(begin, end, [&](auto n, int64_t token) {
            const int64_t start = (token - begin) * share, stop = std::min(start + n() * share, bytes);
            for (int64_t at = start; at < stop; at += 64) __builtin_prefetch(next + at);
            tile<Bits, n()>(weights, scales, a, token * a.groups + first, count, sums + (token - begin) * kPanel);
        });
    }
}

// make_row(token, scratch) returns one token's `columns` floats, computed into the scratch or not.
template <int Bits, class MakeRow>
void multiply_bits(Team& team, ActivationMemory& memory, MakeRow make_row, const Matrix& weight, float* out,
                   int64_t tokens) {
    const int64_t rows = weight.rows, columns = weight.columns;
    const int64_t groups = ceil_div(columns, kGroup), panels = ceil_div(rows, kPanel);
    Value<Bits>* values = reinterpret_cast<Value<Bits>*>(memory.values.data());
    const Activations<Bits> activations{values, memory.scales.data(), memory.scaled_sums.data(), memory.sums.data(),
                                        groups};
    team.share(tokens, kTokensAtATime, [&](int64_t token) {
        static thread_local std::vector<float> row_memory;
        const float* row = make_row(token, scratch(row_memory, columns));
        const int64_t at = token * groups;
        quantize_row(row, columns, groups, values + at * kGroup, &memory.scales[at], &memory.scaled_sums[at],
                     &memory.sums[at]);
    });

    const int64_t panel_bytes = groups * kBlockBytes<Bits>;
    const int64_t items = ceil_div(tokens, kBlockTokens) * panels;
    // Threads take a few panels at a time, so that one that another program slowed down takes fewer.
    const int64_t chunk = std::max<int64_t>(1, panels / ((tokens <= kTokensAtATime ? 4 : 32) * num_threads()));
    alignas(64) float sums[kBlockTokens * kPanel];
    team.share(items, chunk, [&](int64_t item) {
        int64_t begin = item / panels * kBlockTokens, end = std::min(begin + kBlockTokens, tokens);
        int64_t panel = item % panels, row = panel * kPanel, count = std::min<int64_t>(kPanel, rows - row);
        multiply_panel<Bits>(weight.blocks + panel * panel_bytes, activations, begin, end, sums);
        for (int64_t token = begin; token < end; ++token) {
            const float* from = sums + (token - begin) * kPanel;
            float* to = out + token * rows + row;
            if (count == kPanel && !weight.bias) {
                for (int i = 0; i < kPanel; i += kLanes) store(to + i, load(from + i));
            } else {
                for (int64_t i = 0; i < count; ++i) to[i] = weight.bias ? from[i] + weight.bias[row + i] : from[i];
            }
        }
    });
}

template <class MakeRow>
void multiply(Team& team, ActivationMemory& memory, MakeRow make_row, const Matrix& weight, float* out,
              int64_t tokens) {
    auto of_bits = weight.bits == 4 ? multiply_bits<4, MakeRow> : multiply_bits<8, MakeRow>;
    of_bits(team, memory, make_row, weight, out, tokens);
}

// work(team, memory) by all threads, for products of this size.
template <class Work>
void with_memory(int64_t tokens, int64_t columns, Work work) {
    static thread_local ActivationMemory kept;
    ActivationMemory& memory = kept;  // this thread's, for all of them
    memory.reserve(tokens, columns);
    run_team(true, [&](Team& team) { work(team, memory); });
}

}  // namespace

void ActivationMemory::reserve(int64_t tokens, int64_t columns) {
    const int64_t groups = tokens * ceil_div(columns, kGroup);
    scratch(values, groups * kGroup);
    scratch(scales, groups);
    scratch(scaled_sums, groups);
    scratch(sums, groups);
}

void linear(Team& team, ActivationMemory& memory, const float* x, const Matrix& weight, float* out, int64_t tokens) {
    auto take = [=](int64_t token, float*) { return x + token * weight.columns; };
    multiply(team, memory, take, weight, out, tokens);
}

void rms_norm_linear(Team& team, ActivationMemory& memory, const float* x, const float* residual,
                     const float* norm_weight, float eps, float* sum, const Matrix& weight, float* out,
                     int64_t tokens) {
    auto norm = [=](int64_t token, float* row) {
        int64_t at = token * weight.columns;
        rms_norm_row(x + at, residual ? residual + at : nullptr, norm_weight, eps, row, sum ? sum + at : nullptr,
                     weight.columns);
        return row;
    };
    multiply(team, memory, norm, weight, out, tokens);
}

void silu_and_mul_linear(Team& team, ActivationMemory& memory, const float* gate_up, const Matrix& weight, float* out,
                         int64_t tokens) {
    auto activate = [=](int64_t token, float* row) {
        silu_and_mul_row(gate_up + token * 2 * weight.columns, row, weight.columns);
        return row;
    };
    multiply(team, memory, activate, weight, out, tokens);
}

void linear(const float* x, const uint8_t* blocks, int64_t bits, int64_t rows, int64_t columns, const float* bias,
            float* out, int64_t tokens) {
    const Matrix weight{blocks, bits, rows, columns, bias};
    with_memory(tokens, columns, [&](Team& team, ActivationMemory& memory) {
        linear(team, memory, x, weight, out, tokens);
    });
}

void rms_norm_linear(const float* x, const float* residual, const float* norm_weight, float eps, float* sum,
                     const uint8_t* blocks, int64_t bits, int64_t rows, int64_t columns, const float* bias,
                     float* out, int64_t tokens) {
    const Matrix weight{blocks, bits, rows, columns, bias};
    with_memory(tokens, columns, [&](Team& team, ActivationMemory& memory) {
        rms_norm_linear(team, memory, x, residual, norm_weight, eps, sum, weight, out, tokens);
    });
}

void silu_and_mul_linear(const float* gate_up, const uint8_t* blocks, int64_t bits, int64_t rows, int64_t columns,
                         const float* bias, float* out, int64_t tokens) {
    const Matrix weight{blocks, bits, rows, columns, bias};
    with_memory(tokens, columns, [&](Team& team, ActivationMemory& memory) {
        silu_and_mul_linear(team, memory, gate_up, weight, out, tokens);
    });
}

void embedding(const int64_t* ids, const uint8_t* blocks, int64_t bits, int64_t columns, float* out,
               int64_t tokens) {
    const int64_t groups = ceil_div(columns, kGroup), block_bytes = bits == 4 ? kBlockBytes<4> : kBlockBytes<8>;
#pragma omp parallel for schedule(static) if (tokens > kTokensAtATime)
    for (int64_t token = 0; token < tokens; ++token) {
        const int64_t lane = ids[token] % kPanel;
        const uint8_t* panel = blocks + ids[token] / kPanel * groups * block_bytes;
        for (int64_t column = 0; column < columns; ++column) {
            const uint8_t* block = panel + column / kGroup * block_bytes;
            const int64_t k = column % kGroup;
            float* to = out + token * columns + column;
            if (bits == 4) {
                uint8_t both = block[k % 16 / 4 * 64 + lane * 4 + k % 4];
                const Half* scales = (const Half*)(block + 256);
                *to = to_float(scales[lane]) * float(k < 16 ? both & 0x0F : both >> 4) + to_float(scales[16 + lane]);
            } else {
                int value = int(block[k / 4 * 64 + lane * 4 + k % 4]) - 128;
                *to = to_float(((const Half*)(block + 512))[lane]) * float(value);
            }
        }
    }
}

}  // namespace minivllm::ISA
