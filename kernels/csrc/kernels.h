// The functions that Python calls, in one namespace per instruction set. The Python side (cpu.py) has
// checked shapes and types; pointers are to contiguous rows unless there is a stride, in elements.
// Shapes as in interface.py.

#include <cstdint>

namespace minivllm::ISA {

constexpr int64_t kBlockSize = 16;  // slots in a KV block: interface.py's BLOCK_SIZE

// linear.cpp: products with packed weights (see packed.py); `bias` may be null. x is [tokens, columns],
// and so is the residual, which may be null and becomes x + residual.
void linear(const float* x, const uint8_t* blocks, int64_t bits, int64_t rows, int64_t columns,
            const float* bias, float* out, int64_t tokens);
void rms_norm_linear(const float* x, float* residual, const float* norm_weight, float eps, const uint8_t* blocks,
                     int64_t bits, int64_t rows, int64_t columns, const float* bias, float* out, int64_t tokens);
void embedding(const int64_t* ids, const uint8_t* blocks, int64_t bits, int64_t columns, float* out,
               int64_t tokens);

// elementwise.cpp
void rms_norm(const float* x, const float* residual, const float* weight, float eps, float* normed, float* sum,
              int64_t tokens, int64_t size);
void silu_and_mul(const float* gate_up, float* out, int64_t tokens, int64_t size);
void rotary(const float* frequencies, const int64_t* positions, float* cos, float* sin, int64_t tokens,
            int64_t pairs);
void rope_and_write_kv(float* heads, const float* cos, const float* sin, void* k_cache, void* v_cache,
                       int64_t kv_type, const int64_t* slots, int64_t tokens, int64_t num_heads,
                       int64_t kv_heads, int64_t head_dim);

// attention.cpp: a query sees the last `window` tokens, and 0 is no softcap.
void paged_attention(const float* q, int64_t q_stride, const void* k_cache, const void* v_cache,
                     int64_t kv_type, const int32_t* tables, int64_t table_stride, const int32_t* seq_lens,
                     const int32_t* query_start, int64_t num_seqs, int64_t heads, int64_t kv_heads,
                     int64_t head_dim, float scale, int64_t window, float softcap, float* out,
                     int64_t out_stride);

// layers.cpp: all decoder layers of a step; `weights` has num_layers of its `Layer`, `pool` two addresses for each,
// of keys and of values. x [tokens, size] is the first one's input, and what the last one leaves.
void decoder_layers(const void* weights, void* const* pool, int64_t num_layers, float* x, int64_t tokens, int64_t size,
                    int64_t inner_size, int64_t heads, int64_t kv_heads, int64_t head_dim, float eps,
                    const float* frequencies, const int64_t* positions, int64_t kv_type, const int64_t* slots,
                    const int32_t* tables, int64_t table_stride, const int32_t* seq_lens,
                    const int32_t* query_start, int64_t num_seqs, float scale, int64_t window);

// sampling.cpp: `temperature` (and then `keys`, two for each row) may be null for greedy choices.
void draw(const float* scores, int64_t row_stride, const float* temperature, const int32_t* keys, int64_t* tokens,
          int64_t rows, int64_t vocab);
void keep_likely(const float* scores, int64_t row_stride, const float* temperature, const float* min_p,
                 const float* top_k, const float* top_p, float* kept, int64_t rows, int64_t vocab);

// peak.cpp: `rounds` passes of a loop of int8 multiply-adds, from registers alone, on every thread.
// Writes the number of multiply-adds.
void peak_int8(int64_t rounds, int64_t* num_multiply_adds);

}  // namespace minivllm::ISA
