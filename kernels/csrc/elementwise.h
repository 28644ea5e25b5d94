// One token's share of the small operations, for the kernels that fuse them into a product.
#pragma once

#include "simd.h"

namespace minivllm::ISA {

// normed = (x + residual) / rms(x + residual) * weight; `sum` gets x + residual. Without a residual, `sum`
// isn't written and may be null.
INLINE void rms_norm_row(const float* x, const float* residual, const float* weight, float eps, float* normed,
                         float* sum, int64_t size) {
    Vec squares = {};
    float tail = 0.0f;
    int64_t i = 0;
    for (; i + kLanes <= size; i += kLanes) {
        Vec v = load(x + i);
        if (residual != nullptr) {
            v += load(residual + i);
            store(sum + i, v);
        }
        squares = fma(v, v, squares);
    }
    for (; i < size; ++i) {
        float v = x[i];
        if (residual != nullptr) sum[i] = v = v + residual[i];
        tail += v * v;
    }
    const float* total = residual != nullptr ? sum : x;
    float factor = 1.0f / std::sqrt((sum_lanes(squares) + tail) / float(size) + eps);
    for (i = 0; i + kLanes <= size; i += kLanes) store(normed + i, load(total + i) * factor * load(weight + i));
    for (; i < size; ++i) normed[i] = total[i] * factor * weight[i];
}

// out = gate / (1 + e^-gate) * up.
INLINE void silu_and_mul_row(const float* gate, const float* up, float* out, int64_t size) {
    int64_t i = 0;
    for (; i + kLanes <= size; i += kLanes) {
        Vec g = load(gate + i);
        store(out + i, g / (exp(-g) + 1.0f) * load(up + i));
    }
    for (; i < size; ++i) out[i] = gate[i] / (exp(-gate[i]) + 1.0f) * up[i];
}

}  // namespace minivllm::ISA
