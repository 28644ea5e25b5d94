// The ceiling that products are measured against: the instruction set's own u8 × s8 multiply-add,
// from registers, on every thread.

#include "kernels.h"
#include "simd.h"

namespace minivllm::ISA {

namespace {

int64_t run(int64_t rounds) {
    constexpr int kChains = 12;  // independent sums, enough to hide the latency of each
#if defined(__AVX512VNNI__)
    __m512i sums[kChains] = {}, weights = _mm512_set1_epi8(3), x = _mm512_set1_epi8(5);
    for (int64_t i = 0; i < rounds; ++i)
        for (int c = 0; c < kChains; ++c) {
            sums[c] = _mm512_dpbusd_epi32(sums[c], weights, x);
            asm volatile("" : "+v"(sums[c]));
        }
    return rounds * kChains * 64;
#elif defined(__AVX2__)
    __m256i sums[kChains] = {}, weights = _mm256_set1_epi8(3), x = _mm256_set1_epi8(5), ones = _mm256_set1_epi16(1);
    for (int64_t i = 0; i < rounds; ++i)
        for (int c = 0; c < kChains; ++c) {
            __m256i product = _mm256_maddubs_epi16(weights, x);
            asm volatile("" : "+x"(product));
            sums[c] = _mm256_add_epi32(sums[c], _mm256_madd_epi16(product, ones));
            asm volatile("" : "+x"(sums[c]));
        }
    return rounds * kChains * 32;
#else
    int32_t sums[kChains] = {};
    for (int64_t i = 0; i < rounds; ++i)
        for (int c = 0; c < kChains; ++c) {
            sums[c] += 3 * 5;
            asm volatile("" : "+r"(sums[c]));
        }
    return rounds * kChains;
#endif
}

}  // namespace

void peak_int8(int64_t rounds, int64_t* num_multiply_adds) {
    int64_t total = 0;
#pragma omp parallel reduction(+ : total)
    total += run(rounds);
    *num_multiply_adds = total;
}

}  // namespace minivllm::ISA
