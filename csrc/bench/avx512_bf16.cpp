// bf16_peak for AVX-512 BF16: vdpbf16ps on registers.
#include <immintrin.h>

#include "../isa.h"
#include "peak.h"

namespace kt {

peak_result bf16_peak_avx512_bf16(int64_t iterations) {
  record_run(operation::bf16_peak, isa::avx512_bf16);
  constexpr int chains = 16;
  __m512 sums[chains];  // of different values: the compiler would make equal chains one
#pragma GCC unroll 16
  for (int c = 0; c < chains; ++c) sums[c] = _mm512_set1_ps(static_cast<float>(c));
  const __m512bh a = (__m512bh)_mm512_set1_epi32(0x3f003f00);  // 0.5
  const __m512bh w = (__m512bh)_mm512_set1_epi32(0x3e803e80);  // 0.25
  for (int64_t it = 0; it < iterations; ++it) {
#pragma GCC unroll 16
    for (int c = 0; c < chains; ++c) sums[c] = _mm512_dpbf16_ps(sums[c], w, a);
  }
  __m512 total = sums[0];
  for (int c = 1; c < chains; ++c) total = _mm512_add_ps(total, sums[c]);
  constexpr int64_t operations_per_step = int64_t{chains} * 32 * 2;
  return {iterations * operations_per_step, _mm512_reduce_add_epi32(_mm512_castps_si512(total)),
          "vdpbf16ps zmm"};
}

}  // namespace kt
