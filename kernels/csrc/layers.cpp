// All decoder layers of a step in one call: between two kernels there is no Python, the other threads needn't be
// woken from sleep, and what lies between the parts is in memory that is written again and again.

#include <algorithm>
#include <vector>

#include "kernels.h"
#include "parts.h"

namespace minivllm::ISA {

namespace {

// As cpu.py writes it: eight bytes for each field.
struct Layer {
    const float *attention_norm, *mlp_norm;
    Matrix qkv, o, gate_up, down;
    void *k_cache, *v_cache;
};

static_assert(sizeof(Layer) == 24 * sizeof(int64_t), "as cpu.py writes it");

}  // namespace

void decoder_layers(const void* table, int64_t num_layers, float* x, float* out, int64_t tokens, int64_t size,
                    int64_t inner_size, int64_t heads, int64_t kv_heads, int64_t head_dim, float eps,
                    const float* cos, const float* sin, int64_t kv_type, const int64_t* slots,
                    const int32_t* tables, int64_t table_stride, const int32_t* seq_lens,
                    const int32_t* query_start, int64_t num_seqs, float scale, int64_t window) {
    static thread_local std::vector<float> qkv_memory, attended_memory;
    static thread_local ActivationMemory kept, kept_inner;
    const int64_t num_heads = heads + 2 * kv_heads, qkv_size = num_heads * head_dim, attended_size = heads * head_dim;
    // This thread's memory, for all of them.
    float* qkv = scratch(qkv_memory, tokens * qkv_size);
    float* attended = scratch(attended_memory, tokens * attended_size);
    ActivationMemory &memory = kept, &inner_memory = kept_inner;
    memory.reserve(tokens, std::max(size, attended_size));
    inner_memory.reserve(tokens, inner_size);
    AttentionPlan plan({tables, table_stride, seq_lens, query_start, num_seqs, heads, kv_heads, head_dim, scale,
                        window, 0.0f});
    const Layer* layers = static_cast<const Layer*>(table);
    run_team(true, [&](Team& team) {
        for (int64_t i = 0; i < num_layers; ++i) {
            const Layer& layer = layers[i];
            // x is the residual from the first norm on; the first layer's input has nothing to be added to it.
            const float* input = i == 0 ? x : out;
            float* residual = i == 0 ? nullptr : x;
            rms_norm_linear(team, memory, {input, residual, layer.attention_norm, eps}, layer.qkv, qkv, tokens);
            rope_and_write_kv(team, qkv, cos, sin, layer.k_cache, layer.v_cache, kv_type, slots, tokens, num_heads,
                              kv_heads, head_dim);
            paged_attention(team, plan, qkv, qkv_size, layer.k_cache, layer.v_cache, kv_type, attended,
                            attended_size);
            linear(team, memory, attended, layer.o, out, tokens);
            mlp(team, memory, inner_memory, {out, x, layer.mlp_norm, eps}, layer.gate_up, layer.down, out, tokens);
        }
    });
}

}  // namespace minivllm::ISA
