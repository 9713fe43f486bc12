// int8_peak and int4_peak for AVX-VNNI: the 256-bit vpdpbusd on registers.
#include <immintrin.h>

#include "../isa.h"
#include "peak.h"

namespace kt {

peak_result int8_peak_avx_vnni(int64_t iterations) {
  record_run(operation::int8_peak, isa::avx_vnni);
  constexpr int chains = 12;
  using accumulators = int32_t __attribute__((vector_size(32)));  // see int8_gemm/avx2.cpp
  accumulators sums[chains];  // of different values: the compiler would make equal chains one
#pragma GCC unroll 12
  for (int c = 0; c < chains; ++c) sums[c] = accumulators{} + c;
  const __m256i a = _mm256_set1_epi8(3);
  const __m256i w = _mm256_set1_epi8(5);
  for (int64_t it = 0; it < iterations; ++it) {
#pragma GCC unroll 12
    for (int c = 0; c < chains; ++c) {
      sums[c] = reinterpret_cast<accumulators>(
          _mm256_dpbusd_avx_epi32(reinterpret_cast<__m256i>(sums[c]), w, a));
    }
  }
  accumulators total = sums[0];
  for (int c = 1; c < chains; ++c) total ^= sums[c];
  constexpr int64_t operations_per_step = int64_t{chains} * 32 * 2;
  return {iterations * operations_per_step, total[0], "vpdpbusd ymm"};
}

peak_result int4_peak_avx_vnni(int64_t iterations) {
  record_run(operation::int4_peak, isa::avx_vnni);
  return int8_peak_avx_vnni(iterations);
}

}  // namespace kt
