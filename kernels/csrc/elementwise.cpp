// RMSNorm, SwiGLU's product, rotary angles, and rotary embedding with the write to the cache.

#include "elementwise.h"

#include "kernels.h"
#include "parts.h"

namespace minivllm::ISA {

namespace {

constexpr int64_t kMaxHeadDim = 1024;
constexpr int64_t kParallelTokens = 16;  // fewer aren't worth waking the other threads

template <class T>
void write_row(const float* from, T* to, int64_t size) {
    int64_t i = 0;
    for (; i + 8 <= size; i += 8) store8(from + i, to + i);
    for (; i < size; ++i) from_float(from[i], to + i);
}

// Pairs (i, i + size / 2), turned by the angle of i.
void rotate_row(const float* from, const float* cos, const float* sin, float* to, int64_t size) {
    int64_t half = size / 2;
    int64_t i = 0;
    for (; i + kLanes <= half; i += kLanes) {
        Vec first = load(from + i), second = load(from + half + i), c = load(cos + i), s = load(sin + i);
        store(to + i, first * c - second * s);
        store(to + half + i, second * c + first * s);
    }
    for (; i < half; ++i) {
        float first = from[i], second = from[half + i];
        to[i] = first * cos[i] - second * sin[i];
        to[half + i] = second * cos[i] + first * sin[i];
    }
}

template <class T>
void rope_and_write(Team& team, float* heads, const float* cos, const float* sin, T* k_cache, T* v_cache,
                    const int64_t* slots, int64_t tokens, int64_t num_heads, int64_t kv_heads, int64_t head_dim) {
    team.share(tokens, kParallelTokens / 2, [&](int64_t t) {
        const float *c = cos + t * (head_dim / 2), *s = sin + t * (head_dim / 2);
        float* row = heads + t * num_heads * head_dim;
        for (int64_t h = 0; h < num_heads - 2 * kv_heads; ++h, row += head_dim) rotate_row(row, c, s, row, head_dim);
        const int64_t block = slots[t] / kBlockSize, offset = slots[t] % kBlockSize;
        float rotated[kMaxHeadDim];
        for (int64_t h = 0; h < kv_heads; ++h, row += head_dim) {
            const int64_t place = ((block * kv_heads + h) * kBlockSize + offset) * head_dim;
            rotate_row(row, c, s, rotated, head_dim);
            write_row(rotated, k_cache + place, head_dim);
            write_row(row + kv_heads * head_dim, v_cache + place, head_dim);
        }
    });
}

}  // namespace

void rms_norm(const float* x, const float* residual, const float* weight, float eps, float* normed, float* sum,
              int64_t tokens, int64_t size) {
#pragma omp parallel for schedule(static) if (tokens >= kParallelTokens)
    for (int64_t t = 0; t < tokens; ++t) {
        int64_t at = t * size;
        rms_norm_row(x + at, residual ? residual + at : nullptr, weight, eps, normed + at, sum ? sum + at : nullptr,
                     size);
    }
}

void silu_and_mul(const float* gate_up, float* out, int64_t tokens, int64_t size) {
#pragma omp parallel for schedule(static) if (tokens >= kParallelTokens)
    for (int64_t t = 0; t < tokens; ++t) {
        const float* gate = gate_up + t * 2 * size;
        silu_and_mul_row(gate, gate + size, out + t * size, size);
    }
}

void rotary(Team& team, const float* frequencies, const int64_t* positions, float* cos, float* sin, int64_t tokens,
            int64_t pairs) {
    team.share(tokens, kParallelTokens / 2, [&](int64_t t) {
        for (int64_t i = 0; i < pairs; ++i) {
            const float angle = float(positions[t]) * frequencies[i];
            cos[t * pairs + i] = std::cos(angle);
            sin[t * pairs + i] = std::sin(angle);
        }
    });
}

void rope_and_write_kv(Team& team, float* heads, const float* cos, const float* sin, void* k_cache, void* v_cache,
                       int64_t kv_type, const int64_t* slots, int64_t tokens, int64_t num_heads, int64_t kv_heads,
                       int64_t head_dim) {
    auto run = [&](auto* k, auto* v) {
        rope_and_write(team, heads, cos, sin, k, v, slots, tokens, num_heads, kv_heads, head_dim);
    };
    if (kv_type == 0) run((float*)k_cache, (float*)v_cache);
    if (kv_type == 1) run((Half*)k_cache, (Half*)v_cache);
    if (kv_type == 2) run((BFloat*)k_cache, (BFloat*)v_cache);
}

void rotary(const float* frequencies, const int64_t* positions, float* cos, float* sin, int64_t tokens,
            int64_t pairs) {
    run_team(tokens >= kParallelTokens,
             [&](Team& team) { rotary(team, frequencies, positions, cos, sin, tokens, pairs); });
}

void rope_and_write_kv(float* heads, const float* cos, const float* sin, void* k_cache, void* v_cache,
                       int64_t kv_type, const int64_t* slots, int64_t tokens, int64_t num_heads, int64_t kv_heads,
                       int64_t head_dim) {
    run_team(tokens >= kParallelTokens, [&](Team& team) {
        rope_and_write_kv(team, heads, cos, sin, k_cache, v_cache, kv_type, slots, tokens, num_heads, kv_heads,
                          head_dim);
    });
}

}  // namespace minivllm::ISA
