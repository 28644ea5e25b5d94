// What a decoder layer consists of, for the threads of one team: each of them calls each part.
#pragma once

#include <cstdint>
#include <vector>

#include "team.h"

namespace minivllm::ISA {

// A packed weight [rows, columns], and a bias or null.
struct Matrix {
    const uint8_t* blocks;
    int64_t bits, rows, columns;
    const float* bias;
};

// Buffers for one product's quantised activations, reused by the next.
struct ActivationMemory {
    std::vector<uint8_t> values, numbers;

    // Make room for so many tokens of so many columns.
    void reserve(int64_t tokens, int64_t columns);
};

// RMSNorm of x + residual, which becomes the new residual; of x alone where the residual is null.
struct Norm {
    const float* x;
    float* residual;
    const float* weight;
    float eps;
};

// linear.cpp
void linear(Team& team, ActivationMemory& memory, const float* x, const Matrix& weight, float* out, int64_t tokens);
void rms_norm_linear(Team& team, ActivationMemory& memory, const Norm& norm, const Matrix& weight, float* out,
                     int64_t tokens);
// The gates' number is a multiple of 16. `inner_memory` has room for down's columns.
void mlp(Team& team, ActivationMemory& memory, ActivationMemory& inner_memory, const Norm& norm,
         const Matrix& gate_up, const Matrix& down, float* out, int64_t tokens);

// elementwise.cpp
void rotary(Team& team, const float* frequencies, const int64_t* positions, float* cos, float* sin, int64_t tokens,
            int64_t pairs);
void rope_and_write_kv(Team& team, float* heads, const float* cos, const float* sin, void* k_cache, void* v_cache,
                       int64_t kv_type, const int64_t* slots, int64_t tokens, int64_t num_heads, int64_t kv_heads,
                       int64_t head_dim);

// attention.cpp. The batch, the same for all layers of a step:
struct AttentionBatch {
    const int32_t* tables;
    int64_t table_stride;
    const int32_t *seq_lens, *query_start;
    int64_t num_seqs, heads, kv_heads, head_dim;
    float scale;
    int64_t window;  // tokens that a query sees, itself included
    float softcap;   // 0: none

    int64_t group() const { return heads / kv_heads; }
    // The first key that a query at this position sees.
    int64_t window_begin(int64_t position) const { return std::max<int64_t>(0, position + 1 - window); }
};

// Keys that one thread works on at a time.
constexpr int32_t kRangeKeys = 512;

// The work of one tile: rows [row, row + rows) of sequence and KV head. Row r is the sequence's query
// r / group, in the head's r % group-th query head.
struct AttentionTile {
    int32_t sequence, kv_head, row, rows;
    int32_t first_position;  // of the sequence's queries
    int32_t begin, end;      // the keys that any of its rows sees

    int32_t first_range() const { return begin / kRangeKeys; }
    int32_t end_range() const { return (end + kRangeKeys - 1) / kRangeKeys; }
    int32_t num_ranges() const { return end_range() - first_range(); }
};

// How a batch's attention is divided among threads.
struct AttentionPlan {
    // One range of one tile's keys.
    struct Item {
        int64_t tile;
        int32_t range;
    };

    explicit AttentionPlan(const AttentionBatch& batch);

    AttentionBatch batch;
    std::vector<AttentionTile> tiles;
    int64_t work = 0;  // rows times ranges
    // Where there are fewer tiles than threads could use: the ranges of all of them, where each tile's begin, and
    // memory for a result of each. Empty otherwise.
    std::vector<Item> items;
    std::vector<int64_t> first_item;
    std::vector<float> partials;
};

void paged_attention(Team& team, AttentionPlan& plan, const float* q, int64_t q_stride, const void* k_cache,
                     const void* v_cache, int64_t kv_type, float* out, int64_t out_stride);

}  // namespace minivllm::ISA
