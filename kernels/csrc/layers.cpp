// All decoder layers of a step in one call: between two kernels there is no Python, the other threads needn't be
// woken from sleep, and what lies between the parts is in memory that is written again and again.

#include <algorithm>
#include <vector>

#include "kernels.h"
#include "parts.h"

namespace minivllm::ISA {

namespace {

// As layers.py writes it: eight bytes for each field.
struct Layer {
    const float *attention_norm, *mlp_norm;
    Matrix qkv, o, gate_up, down;
};

static_assert(sizeof(Layer) == 22 * sizeof(int64_t), "as layers.py writes it");

}  // namespace

void decoder_layers(const void* weights, void* const* pool, int64_t num_layers, float* x, int64_t tokens, int64_t size,
                    int64_t inner_size, int64_t heads, int64_t kv_heads, int64_t head_dim, float eps,
                    const float* frequencies, const int64_t* positions, int64_t kv_type, const int64_t* slots,
                    const int32_t* tables, int64_t table_stride, const int32_t* seq_lens,
                    const int32_t* query_start, int64_t num_seqs, float scale, int64_t window) {
    static thread_local std::vector<float> floats;
    static thread_local ActivationMemory kept, kept_inner;
    const int64_t num_heads = heads + 2 * kv_heads, qkv_size = num_heads * head_dim, attended_size = heads * head_dim;
    const int64_t pairs = head_dim / 2;
    // This thread's memory, for all of them.
    float* qkv = scratch(floats, tokens * (qkv_size + attended_size + size + 2 * pairs));
    float* attended = qkv + tokens * qkv_size;
    float* out = attended + tokens * attended_size;
    float *cos = out + tokens * size, *sin = cos + tokens * pairs;
    ActivationMemory &memory = kept, &inner_memory = kept_inner;
    memory.reserve(tokens, std::max(size, attended_size));
    inner_memory.reserve(tokens, inner_size);
    AttentionPlan plan({tables, table_stride, seq_lens, query_start, num_seqs, heads, kv_heads, head_dim, scale,
                        window, 0.0f});
    const Layer* layers = static_cast<const Layer*>(weights);
    run_team(true, [&](Team& team) {
        rotary(team, frequencies, positions, cos, sin, tokens, pairs);
        for (int64_t i = 0; i < num_layers; ++i) {
            const Layer& layer = layers[i];
            void *k_cache = pool[2 * i], *v_cache = pool[2 * i + 1];
            // x is the residual from the first norm on; the first layer's input has nothing to be added to it.
            const float* input = i == 0 ? x : out;
            float* residual = i == 0 ? nullptr : x;
            rms_norm_linear(team, memory, {input, residual, layer.attention_norm, eps}, layer.qkv, qkv, tokens);
            rope_and_write_kv(team, qkv, cos, sin, k_cache, v_cache, kv_type, slots, tokens, num_heads, kv_heads,
                              head_dim);
            paged_attention(team, plan, qkv, qkv_size, k_cache, v_cache, kv_type, attended, attended_size);
            linear(team, memory, attended, layer.o, out, tokens);
            mlp(team, memory, inner_memory, {out, x, layer.mlp_norm, eps}, layer.gate_up, layer.down, out, tokens);
        }
        team.share(tokens, 8, [&](int64_t t) {
            for (int64_t i = t * size; i < (t + 1) * size; ++i) x[i] += out[i];
        });
    });
}

}  // namespace minivllm::ISA
