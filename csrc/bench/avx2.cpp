// Peaks for AVX2: the dot products of the AVX2 kernels on registers.
#include <immintrin.h>

#include "../isa.h"
#include "peak.h"

namespace kt {

peak_result int8_peak_avx2(int64_t iterations) {
  record_run(operation::int8_peak, isa::avx2);
  constexpr int chains = 8;
  using accumulators = uint32_t __attribute__((vector_size(32)));  // see int8_gemm/avx2.cpp
  accumulators sums[chains] = {};
  __m256i a = _mm256_set1_epi8(3);
  __m256i w = _mm256_set1_epi8(-5);
  __m256i w_magnitude = _mm256_abs_epi8(w);
  const __m256i ones = _mm256_set1_epi16(1);
  for (int64_t it = 0; it < iterations; ++it) {
#pragma GCC unroll 8
    for (int c = 0; c < chains; ++c) {
      __asm__ volatile("" : "+x"(a));  // the product must not be hoisted out of the loop
      const __m256i pairs = _mm256_maddubs_epi16(w_magnitude, _mm256_sign_epi8(a, w));
      sums[c] += reinterpret_cast<accumulators>(_mm256_madd_epi16(pairs, ones));
    }
  }
  accumulators total = sums[0];
  for (int c = 1; c < chains; ++c) total ^= sums[c];
  constexpr int64_t operations_per_step = int64_t{chains} * 32 * 2;
  return {iterations * operations_per_step, static_cast<int32_t>(total[0]),
          "vpsignb + vpmaddubsw + vpmaddwd + vpaddd"};
}

peak_result int4_peak_avx2(int64_t iterations) {
  record_run(operation::int4_peak, isa::avx2);
  constexpr int chains = 8;
  using sums16 = uint16_t __attribute__((vector_size(32)));  // see int4_gemm/avx2.cpp
  sums16 sums[chains] = {};
  __m256i a = _mm256_set1_epi8(3);
  const __m256i w = _mm256_set1_epi8(5);
  for (int64_t it = 0; it < iterations; ++it) {
#pragma GCC unroll 8
    for (int c = 0; c < chains; ++c) {
      __asm__ volatile("" : "+x"(a));  // the product must not be hoisted out of the loop
      sums[c] += reinterpret_cast<sums16>(_mm256_maddubs_epi16(w, a));
    }
  }
  sums16 total = sums[0];
  for (int c = 1; c < chains; ++c) total ^= sums[c];
  constexpr int64_t operations_per_step = int64_t{chains} * 32 * 2;
  return {iterations * operations_per_step, total[0], "vpmaddubsw + vpaddw"};
}

peak_result bf16_peak_avx2(int64_t iterations) {
  record_run(operation::bf16_peak, isa::avx2);
  constexpr int chains = 10;
  __m256 sums[chains];  // of different values: the compiler would make equal chains one
#pragma GCC unroll 10
  for (int c = 0; c < chains; ++c) sums[c] = _mm256_set1_ps(static_cast<float>(c));
  const __m256 a = _mm256_set1_ps(0.5f), w = _mm256_set1_ps(0.25f);
  for (int64_t it = 0; it < iterations; ++it) {
#pragma GCC unroll 10
    for (int c = 0; c < chains; ++c) sums[c] = _mm256_fmadd_ps(a, w, sums[c]);
  }
  __m256 total = sums[0];
  for (int c = 1; c < chains; ++c) total = _mm256_add_ps(total, sums[c]);
  constexpr int64_t operations_per_step = int64_t{chains} * 8 * 2;
  return {iterations * operations_per_step,
          _mm_cvtsi128_si32(_mm_castps_si128(_mm256_castps256_ps128(total))), "vfmadd231ps ymm"};
}

}  // namespace kt
