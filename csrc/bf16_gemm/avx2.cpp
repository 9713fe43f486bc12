// bf16_gemm for AVX2 with FMA: bf16 is the high half of fp32, so a shift or a mask widens it.
#include <immintrin.h>

#include <cassert>

#include "../isa.h"
#include "../lanes256.h"
#include "../row_groups.h"
#include "bf16_gemm.h"

namespace kt {
namespace {

// 5 x 2 sums, 2 vectors of weights, the mask and 3 broadcasts: 16 registers. GCC spills with 6
// rows.
constexpr int tile_rows = 5;
constexpr int64_t prefetch_bytes = 4096;  // as in int8_gemm/avx2.cpp

__m256 even(__m256i pairs) { return _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)); }

__m256 odd(__m256i pairs) {
  const __m256i mask = _mm256_set1_epi32(static_cast<int32_t>(0xffff0000u));
  return _mm256_castsi256_ps(_mm256_and_si256(pairs, mask));
}

// Loads stay below this line: GCC would start with all of them and run out of registers.
void keep_order() { __asm__ volatile("" ::: "memory"); }

// One panel of 16 outputs for MR rows that start at row index i.
template <int MR>
void tile(const gemm_args& args, int64_t i, int64_t j) {
  const int64_t k = args.k;
  const uint16_t* line = static_cast<const uint16_t*>(args.packed) + j * k;
  const uint16_t* a[MR];
  __m256 sums[MR][2];
#pragma GCC unroll 8
  for (int r = 0; r < MR; ++r) {
    a[r] = static_cast<const uint16_t*>(args.a) + (args.rows ? args.rows[i + r] : i + r) * k;
    sums[r][0] = sums[r][1] = _mm256_setzero_ps();
  }
  int64_t kk = 0;
  do {
    _mm_prefetch(reinterpret_cast<const char*>(line) + prefetch_bytes, _MM_HINT_T0);
    const __m256i* w = reinterpret_cast<const __m256i*>(line);
    const __m256 even0 = even(load(w)), even1 = even(load(w + 1));
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r) {
      const __m256 first = even(broadcast4(a[r] + kk));
      sums[r][0] = _mm256_fmadd_ps(even0, first, sums[r][0]);
      sums[r][1] = _mm256_fmadd_ps(even1, first, sums[r][1]);
    }
    keep_order();
    const __m256 odd0 = odd(load(w)), odd1 = odd(load(w + 1));
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r) {
      const __m256 second = odd(broadcast4(a[r] + kk));
      sums[r][0] = _mm256_fmadd_ps(odd0, second, sums[r][0]);
      sums[r][1] = _mm256_fmadd_ps(odd1, second, sums[r][1]);
    }
    kk += 2;
    line += 32;
  } while (kk < k);
#pragma GCC unroll 8
  for (int r = 0; r < MR; ++r) {
    float* c = args.c + (i + r) * args.c_stride + j;
    _mm256_storeu_ps(c, sums[r][0]);
    _mm256_storeu_ps(c + 8, sums[r][1]);
  }
}

constexpr tile_fn* tiles[tile_rows] = {tile<1>, tile<2>, tile<3>, tile<4>, tile<5>};

}  // namespace

void bf16_gemm_avx2(const gemm_args& args) {
  record_run(operation::bf16_gemm, isa::avx2);
  assert(args.k > 0 && args.k % bf16_gemm_k_multiple == 0);
  assert(args.n % gemm_n_multiple == 0);
  by_panel(args, tiles);
}

}  // namespace kt
