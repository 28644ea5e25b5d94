// x @ weight.T with packed weights of 4 or 8 bits and activations quantised on the fly, and what
// comes just before such a product, fused with the quantisation.

#include <algorithm>
#include <type_traits>
#include <vector>

#include "dot.h"
#include "elementwise.h"
#include "kernels.h"
#include "parts.h"

namespace minivllm::ISA {

namespace {

// Groups that are unpacked at once: they stay in the L1 cache.
template <int Bits>
constexpr int64_t kBlockGroups = 24 * 1024 / kUnpackedBytes<Bits>;
// Tiles that pass over them, and the most tokens that these have: their activations stay in L2.
constexpr int64_t kBlockTiles = 128 / kTileTokens, kBlockTokens = kBlockTiles * kTileTokens;

constexpr int64_t kFewTokens = 4;  // a product of so many is a matter of reading its weights

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Columns of one token, group by group, from its group `first` on; columns past the end are zero.
template <int Bits>
void round_row(const float* x, int64_t columns, const Activations<Bits>& to, int64_t token, int64_t first) {
    typename Activations<Bits>::Row row(to, token, first);
    int64_t column = 0;
    for (; column + kGroup <= columns; column += kGroup) row.write(x + column);
    if (column == columns) return;
    float padded[kGroup] = {};
    std::copy(x + column, x + columns, padded);
    row.write(padded);
}

// One panel of 16 rows times the tiles [begin, end): [tokens, 16]. It is unpacked once for all of them.
template <int Bits>
void multiply_panel(const uint8_t* panel, const Activations<Bits>& a, int64_t begin, int64_t end, float* sums) {
    if (end - begin == 1) {
        for_count(a.tile_begin(end) - a.tile_begin(begin), [&](auto n) {
            tile_packed<Bits, n()>(panel, TileActivations<Bits>(a, begin, 0), a.groups, sums);
        });
        return;
    }
    const int64_t first_token = a.tile_begin(begin);
    alignas(64) uint8_t weights[kBlockGroups<Bits> * kUnpackedBytes<Bits>];
    const int64_t step = ceil_div(a.groups, ceil_div(a.groups, kBlockGroups<Bits>));
    for (int64_t first = 0; first < a.groups; first += step) {
        const int64_t count = std::min(step, a.groups - first);
        for (int64_t g = 0; g < count; ++g)
            unpack<Bits>(panel + (first + g) * kBlockBytes<Bits>, weights + g * kUnpackedBytes<Bits>);
        // The panel that comes next in memory is most likely this thread's next one, too. It is asked for a
        // little at a time while this one's tokens are computed.
        const int64_t bytes = count * kBlockBytes<Bits>, share = ceil_div(bytes, end - begin) / 64 * 64 + 64;
        const uint8_t* next = panel + a.groups * kBlockBytes<Bits> + first * kBlockBytes<Bits>;
        for (int64_t i = begin; i < end; ++i) {
            const int64_t start = (i - begin) * share, stop = std::min(start + share, bytes);
            for (int64_t at = start; at < stop; at += 64) __builtin_prefetch(next + at);
            const int64_t token = a.tile_begin(i);
            for_count(a.tile_begin(i + 1) - token, [&](auto n) {
                tile<Bits, n()>(weights, TileActivations<Bits>(a, i, first), count, first > 0,
                                sums + (token - first_token) * kPanel);
            });
        }
    }
}

// The panel at `row` times the tiles [begin, end), and its bias: [tokens, 16].
template <int Bits>
void multiply_rows(const Matrix& weight, int64_t row, const Activations<Bits>& a, int64_t begin, int64_t end,
                   float* sums) {
    multiply_panel<Bits>(weight.blocks + row / kPanel * a.groups * kBlockBytes<Bits>, a, begin, end, sums);
    if (weight.bias == nullptr) return;
    const int64_t count = std::min<int64_t>(kPanel, weight.rows - row);
    for (int64_t token = a.tile_begin(begin); token < a.tile_begin(end); ++token, sums += kPanel)
        for (int64_t i = 0; i < count; ++i) sums[i] += weight.bias[row + i];
}

// Threads take a few of the items that each block of tokens has at a time, so that one that another program slowed
// down takes fewer; and not single ones, whose results lie too close to another thread's.
int64_t at_a_time(int64_t items, int64_t tokens) {
    return std::max<int64_t>(4, items / ((tokens <= kFewTokens ? 4 : 32) * num_threads()));
}

template <int Bits>
Activations<Bits> activations_in(ActivationMemory& memory, int64_t columns, int64_t tokens) {
    return Activations<Bits>(aligned(memory.values), aligned(memory.numbers), ceil_div(columns, kGroup), tokens);
}

// Blocks of tiles that pass over a panel's weights together: of equal size, or one less.
struct Blocks {
    int64_t num_tiles, num_blocks = ceil_div(num_tiles, kBlockTiles);

    int64_t begin(int64_t block) const { return block * num_tiles / num_blocks; }
};

// make_row(token, scratch) returns one token's `columns` floats, computed into the scratch or not.
template <int Bits, class MakeRow>
Activations<Bits> quantize(Team& team, ActivationMemory& memory, MakeRow make_row, int64_t columns, int64_t tokens) {
    const Activations<Bits> a = activations_in<Bits>(memory, columns, tokens);
    team.share(tokens, kStrip, [&](int64_t token) {
        static thread_local std::vector<float> row_memory;
        round_row(make_row(token, scratch(row_memory, columns)), columns, a, token, 0);
    });
    return a;
}

template <int Bits>
void multiply(Team& team, const Activations<Bits>& a, const Matrix& weight, float* out) {
    const int64_t panels = ceil_div(weight.rows, kPanel);
    const Blocks blocks{a.num_tiles};
    alignas(64) float sums[kBlockTokens * kPanel];
    team.share(blocks.num_blocks * panels, at_a_time(panels, a.tokens), [&](int64_t item) {
        const int64_t begin = blocks.begin(item / panels), end = blocks.begin(item / panels + 1);
        const int64_t row = item % panels * kPanel, count = std::min<int64_t>(kPanel, weight.rows - row);
        multiply_rows(weight, row, a, begin, end, sums);
        const float* from = sums;
        for (int64_t token = a.tile_begin(begin); token < a.tile_begin(end); ++token, from += kPanel) {
            float* to = out + token * weight.rows + row;
            if (count == kPanel)
                for (int i = 0; i < kPanel; i += kLanes) store(to + i, load(from + i));
            else
                std::copy(from, from + count, to);
        }
    });
}

// run(std::integral_constant<int, bits>).
template <class Run>
void for_bits(int64_t bits, Run run) {
    if (bits == 4) run(std::integral_constant<int, 4>{});
    if (bits == 8) run(std::integral_constant<int, 8>{});
}

template <class MakeRow>
void quantize_and_multiply(Team& team, ActivationMemory& memory, MakeRow make_row, const Matrix& weight, float* out,
                           int64_t tokens) {
    for_bits(weight.bits, [&](auto bits) {
        const auto a = quantize<bits()>(team, memory, make_row, weight.columns, tokens);
        multiply(team, a, weight, out);
    });
}

// silu(gate) * up of the tokens, quantised for a product with weights of InnerBits: a group of 32 columns at a time
// from its two panels of gates and two of ups, while these are in the L1 cache.
template <int InnerBits, int Bits>
void multiply_gate_up(Team& team, const Activations<Bits>& a, const Matrix& weight,
                      const Activations<InnerBits>& inner) {
    const int64_t inner_size = weight.rows / 2;
    const Blocks blocks{a.num_tiles};
    alignas(64) float gates[kBlockTokens * kPanel], ups[kBlockTokens * kPanel], activated[kBlockTokens * kGroup];
    team.share(blocks.num_blocks * inner.groups, at_a_time(inner.groups, a.tokens), [&](int64_t item) {
        const int64_t begin = blocks.begin(item / inner.groups), end = blocks.begin(item / inner.groups + 1);
        const int64_t first_token = a.tile_begin(begin), num_tokens = a.tile_begin(end) - first_token;
        const int64_t group = item % inner.groups, first = group * kGroup;
        const int64_t count = std::min<int64_t>(kGroup, inner_size - first);
        for (int64_t column = 0; column < count; column += kPanel) {
            multiply_rows(weight, first + column, a, begin, end, gates);
            multiply_rows(weight, inner_size + first + column, a, begin, end, ups);
            for (int64_t i = 0; i < num_tokens; ++i)
                silu_and_mul_row(gates + i * kPanel, ups + i * kPanel, activated + i * kGroup + column, kPanel);
        }
        for (int64_t i = 0; i < num_tokens; ++i)
            round_row(activated + i * kGroup, count, inner, first_token + i, group);
    });
}

auto norm_rows(const Norm& norm, int64_t size) {
    return [=](int64_t token, float* row) {
        const int64_t at = token * size;
        rms_norm_row(norm.x + at, norm.residual ? norm.residual + at : nullptr, norm.weight, norm.eps, row,
                     norm.residual ? norm.residual + at : nullptr, size);
        return row;
    };
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
    const int64_t groups = ceil_div(columns, kGroup);
    scratch(values, Activations<8>::value_bytes(tokens, groups));
    scratch(numbers, Activations<8>::number_bytes(tokens, groups));
}

void linear(Team& team, ActivationMemory& memory, const float* x, const Matrix& weight, float* out, int64_t tokens) {
    auto take = [=](int64_t token, float*) { return x + token * weight.columns; };
    quantize_and_multiply(team, memory, take, weight, out, tokens);
}

void rms_norm_linear(Team& team, ActivationMemory& memory, const Norm& norm, const Matrix& weight, float* out,
                     int64_t tokens) {
    quantize_and_multiply(team, memory, norm_rows(norm, weight.columns), weight, out, tokens);
}

void mlp(Team& team, ActivationMemory& memory, ActivationMemory& inner_memory, const Norm& norm,
         const Matrix& gate_up, const Matrix& down, float* out, int64_t tokens) {
    for_bits(gate_up.bits, [&](auto bits) {
        for_bits(down.bits, [&](auto inner_bits) {
            const auto a = quantize<bits()>(team, memory, norm_rows(norm, gate_up.columns), gate_up.columns, tokens);
            const auto inner = activations_in<inner_bits()>(inner_memory, down.columns, tokens);
            multiply_gate_up(team, a, gate_up, inner);
            multiply(team, inner, down, out);
        });
    });
}

void linear(const float* x, const uint8_t* blocks, int64_t bits, int64_t rows, int64_t columns, const float* bias,
            float* out, int64_t tokens) {
    const Matrix weight{blocks, bits, rows, columns, bias};
    with_memory(tokens, columns, [&](Team& team, ActivationMemory& memory) {
        linear(team, memory, x, weight, out, tokens);
    });
}

void rms_norm_linear(const float* x, float* residual, const float* norm_weight, float eps, const uint8_t* blocks,
                     int64_t bits, int64_t rows, int64_t columns, const float* bias, float* out, int64_t tokens) {
    const Matrix weight{blocks, bits, rows, columns, bias};
    with_memory(tokens, columns, [&](Team& team, ActivationMemory& memory) {
        rms_norm_linear(team, memory, {x, residual, norm_weight, eps}, weight, out, tokens);
    });
}

void embedding(const int64_t* ids, const uint8_t* blocks, int64_t bits, int64_t columns, float* out,
               int64_t tokens) {
    const int64_t groups = ceil_div(columns, kGroup), block_bytes = bits == 4 ? kBlockBytes<4> : kBlockBytes<8>;
#pragma omp parallel for schedule(static) if (tokens > kFewTokens)
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
