// The two halves of a decoder layer, so that Python is left once for each and what lies between the parts
// stays in memory that is written again and again, and therefore in the cache.

#include <vector>

#include "kernels.h"
#include "threads.h"

namespace minivllm::ISA {

void attention_layer(const float* x, const float* residual, const float* norm_weight, float eps, float* sum,
                     const uint8_t* qkv, int64_t qkv_bits, int64_t qkv_rows, int64_t columns,
                     const float* qkv_bias, const float* cos, const float* sin, void* k_cache, void* v_cache,
                     int64_t kv_type, const int64_t* slots, const int32_t* tables, int64_t table_stride,
                     const int32_t* seq_lens, const int32_t* query_start, int64_t num_seqs, int64_t kv_heads,
                     int64_t head_dim, float scale, int64_t window, const uint8_t* o, int64_t o_bits,
                     int64_t o_rows, int64_t o_columns, const float* o_bias, float* out, int64_t tokens) {
    static thread_local std::vector<float> head_memory, attended_memory;
    float* heads = scratch(head_memory, tokens * qkv_rows);
    float* attended = scratch(attended_memory, tokens * o_columns);
    rms_norm_linear(x, residual, norm_weight, eps, sum, qkv, qkv_bits, qkv_rows, columns, qkv_bias, heads, tokens);
    rope_and_write_kv(heads, cos, sin, k_cache, v_cache, kv_type, slots, tokens, qkv_rows / head_dim, kv_heads,
                      head_dim);
    paged_attention(heads, qkv_rows, k_cache, v_cache, kv_type, tables, table_stride, seq_lens, query_start,
                    num_seqs, o_columns / head_dim, kv_heads, head_dim, scale, window, 0.0f, attended, o_columns);
    linear(attended, o, o_bits, o_rows, o_columns, o_bias, out, tokens);
}

void mlp_layer(const float* x, const float* residual, const float* norm_weight, float eps, float* sum,
               const uint8_t* gate_up, int64_t gate_up_bits, int64_t gate_up_rows, int64_t columns,
               const float* gate_up_bias, const uint8_t* down, int64_t down_bits, int64_t down_rows,
               int64_t size, const float* down_bias, float* out, int64_t tokens) {
    static thread_local std::vector<float> memory;
    float* both = scratch(memory, tokens * gate_up_rows);
    rms_norm_linear(x, residual, norm_weight, eps, sum, gate_up, gate_up_bits, gate_up_rows, columns, gate_up_bias,
                    both, tokens);
    silu_and_mul_linear(both, down, down_bits, down_rows, size, down_bias, out, tokens);
}

}  // namespace minivllm::ISA
