// bf16_gemm for AVX-512 BF16: vdpbf16ps adds two products of bf16 to each fp32 sum.
#include <immintrin.h>

#include <cassert>

#include "../isa.h"
#include "../lanes512.h"
#include "../row_groups.h"
#include "bf16_gemm.h"

namespace kt {
namespace {

// 6 x 4 sums and 4 lines of weights: 28 of 32 registers; activations are broadcast from memory. A
// panel alone takes 12 rows: with 6 there would be too few sums to hide the latency.
constexpr int tile_rows = 6;
constexpr int panel_rows = 12;

// NR panels of 16 outputs for MR rows that start at row index i.
template <int MR, int NR>
void tile(const gemm_args& args, int64_t i, int64_t j) {
  const int64_t k = args.k;
  const int64_t panel_weights = k * panel_outputs;
  const uint16_t* line = static_cast<const uint16_t*>(args.packed) + j * k;
  const uint16_t* a[MR];
  __m512 sums[MR][NR];
#pragma GCC unroll 12
  for (int r = 0; r < MR; ++r) {
    a[r] = static_cast<const uint16_t*>(args.a) + (args.rows ? args.rows[i + r] : i + r) * k;
#pragma GCC unroll 12
    for (int c = 0; c < NR; ++c) sums[r][c] = _mm512_set1_ps(0.0f);
  }
  int64_t kk = 0;
  do {
    __m512bh w[NR];
#pragma GCC unroll 12
    for (int c = 0; c < NR; ++c) {
      w[c] = (__m512bh)_mm512_loadu_si512(line + c * panel_weights);
    }
#pragma GCC unroll 12
    for (int r = 0; r < MR; ++r) {
      const __m512bh two = (__m512bh)broadcast4(a[r] + kk);
#pragma GCC unroll 12
      for (int c = 0; c < NR; ++c) sums[r][c] = _mm512_dpbf16_ps(sums[r][c], w[c], two);
    }
    kk += 2;
    line += 32;
  } while (kk < k);
#pragma GCC unroll 12
  for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 12
    for (int c = 0; c < NR; ++c) {
      _mm512_storeu_ps(args.c + (i + r) * args.c_stride + j + c * panel_outputs, sums[r][c]);
    }
  }
}

template <int NR>
constexpr tile_fn* tiles[tile_rows] = {tile<1, NR>, tile<2, NR>, tile<3, NR>,
                                       tile<4, NR>, tile<5, NR>, tile<6, NR>};
constexpr tile_fn* panel_tiles[panel_rows] = {tile<1, 1>, tile<2, 1>,  tile<3, 1>,  tile<4, 1>,
                                              tile<5, 1>, tile<6, 1>,  tile<7, 1>,  tile<8, 1>,
                                              tile<9, 1>, tile<10, 1>, tile<11, 1>, tile<12, 1>};

}  // namespace

void bf16_gemm_avx512_bf16(const gemm_args& args) {
  record_run(operation::bf16_gemm, isa::avx512_bf16);
  assert(args.k > 0 && args.k % bf16_gemm_k_multiple == 0);
  assert(args.n % bf16_gemm_n_multiple == 0);
  gemm_args pairs = args;
  pairs.n = args.n / gemm_n_multiple * gemm_n_multiple;
  by_four_panels(pairs, tiles<4>, tiles<2>);
  if (pairs.n < args.n) in_row_groups(args, pairs.n, panel_tiles);
}

}  // namespace kt
