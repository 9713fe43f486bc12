// int8_gemm for AVX2: |w| times sign(a, w) with vpmaddubsw, pairs widened with vpmaddwd.
//
// vpmaddubsw multiplies unsigned by signed bytes and adds pairs with saturation to 16 bits. With
// both operands in [-127, 127] a pair is at most 2 * 127 * 127 = 32258 in magnitude: never
// saturated. |w| is computed once per line for all rows of the tile.
#include <immintrin.h>

#include <cassert>

#include "../isa.h"
#include "../lanes256.h"
#include "../row_groups.h"
#include "int8_gemm.h"

namespace kt {
namespace {

// 4 x 2 accumulators, 2 w, 2 |w|, ones and temporaries fit the 16 registers. On Zen 3, from the L1
// cache, 3 rows reach 86 % of the peak, 4 rows 90 %; 5 and 6 rows 91 %, but spill.
constexpr int tile_rows = 4;
// Zen 3's own prefetcher stops at pages of 4 KiB.
constexpr int64_t prefetch_bytes = 4096;
// So few rows take two panels at a time: memory is read in two places at once.
constexpr int few_rows = 2;

accumulators dot4(accumulators sums, __m256i w_magnitude, __m256i a, __m256i w) {
  const __m256i pairs = _mm256_maddubs_epi16(w_magnitude, _mm256_sign_epi8(a, w));
  const __m256i fours = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
  return sums + reinterpret_cast<accumulators>(fours);
}

// `panels` panels of 16 outputs for MR rows that start at row index i.
template <int MR, int panels>
void tile(const gemm_args& args, int64_t i, int64_t j) {
  const int64_t k = args.k;
  int64_t row[MR];
  const int8_t* a[MR];
  accumulators sums[panels][MR][2];
#pragma GCC unroll 8
  for (int r = 0; r < MR; ++r) {
    row[r] = args.rows ? args.rows[i + r] : i + r;
    a[r] = static_cast<const int8_t*>(args.a) + row[r] * k;
#pragma GCC unroll 2
    for (int p = 0; p < panels; ++p) sums[p][r][0] = sums[p][r][1] = accumulators{};
  }
  const int8_t* line = static_cast<const int8_t*>(args.packed) + j * k;
  int64_t kk = 0;
  do {
#pragma GCC unroll 2
    for (int p = 0; p < panels; ++p) {
      const int8_t* w = line + p * panel_outputs * k;
      _mm_prefetch(w + prefetch_bytes, _MM_HINT_T0);
      const __m256i w0 = load(w);
      const __m256i w1 = load(w + 32);
      const __m256i w0_magnitude = _mm256_abs_epi8(w0);
      const __m256i w1_magnitude = _mm256_abs_epi8(w1);
#pragma GCC unroll 8
      for (int r = 0; r < MR; ++r) {
        const __m256i four = broadcast4(a[r] + kk);
        sums[p][r][0] = dot4(sums[p][r][0], w0_magnitude, four, w0);
        sums[p][r][1] = dot4(sums[p][r][1], w1_magnitude, four, w1);
      }
    }
    kk += 4;
    line += 64;
  } while (kk < k);
#pragma GCC unroll 2
  for (int p = 0; p < panels; ++p) {
    const int64_t output = j + p * panel_outputs;
    const float* w_scale = static_cast<const float*>(args.w_scale) + output;
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r) {
      float* c = args.c + (i + r) * args.c_stride + output;
      store_scaled(c, sums[p][r][0], args.a_scale[row[r]], w_scale);
      store_scaled(c + 8, sums[p][r][1], args.a_scale[row[r]], w_scale + 8);
    }
  }
}

constexpr tile_fn* tiles[tile_rows] = {tile<1, 1>, tile<2, 1>, tile<3, 1>, tile<4, 1>};
constexpr tile_fn* few_tiles[few_rows] = {tile<1, 2>, tile<2, 2>};

}  // namespace

void int8_gemm_avx2(const gemm_args& args) {
  record_run(operation::int8_gemm, isa::avx2);
  assert(args.k > 0 && args.k % int8_gemm_k_multiple == 0);
  assert(args.n % gemm_n_multiple == 0);
  by_panel_or_two(args, tiles, few_tiles);
}

}  // namespace kt
