// int16_gemm for AVX-512 VNNI: vpdpwssd adds two products of int16 to each lane.
#include <immintrin.h>

#include <cassert>

#include "../isa.h"
#include "../lanes512.h"
#include "../row_groups.h"
#include "int16_gemm.h"

namespace kt {
namespace {

// 6 x 4 sums and 4 lines of weights: 28 of 32 registers; activations are broadcast from memory. A
// panel alone takes 12 rows: with 6 there would be too few sums to hide the latency.
constexpr int tile_rows = 6;
constexpr int panel_rows = 12;
constexpr int64_t four_panels = 4 * panel_outputs;

accumulators dot2(accumulators sums, __m512i w, __m512i a) {
  return reinterpret_cast<accumulators>(_mm512_dpwssd_epi32(reinterpret_cast<__m512i>(sums), w, a));
}

// c = c * before + sums * scale, sixteen outputs
void add_scaled(float* c, accumulators sums, __m512 scale, __m512 before) {
  const __m512 kept = _mm512_mul_ps(_mm512_loadu_ps(c), before);
  _mm512_storeu_ps(c, _mm512_add_ps(kept, _mm512_mul_ps(to_float(sums), scale)));
}

// NR panels of 16 outputs for MR rows from row i on.
template <int MR, int NR>
void tile(const int16_gemm_args& args, int64_t i, int64_t j) {
  const int64_t a_stride = args.a_stride, c_stride = args.c_stride;
  const int64_t panel_weights = panel_outputs * args.k;
  const uint16_t* a = args.a + i * a_stride;
  const uint16_t* line = args.packed + j * args.k;
  accumulators sums[MR][NR] = {};
  for (const uint16_t* end = a + args.k; a < end; a += 2, line += 32) {
    __m512i w[NR];
#pragma GCC unroll 4
    for (int c = 0; c < NR; ++c) w[c] = _mm512_loadu_si512(line + c * panel_weights);
#pragma GCC unroll 12
    for (int r = 0; r < MR; ++r) {
      const __m512i two = broadcast4(a + r * a_stride);
#pragma GCC unroll 4
      for (int c = 0; c < NR; ++c) sums[r][c] = dot2(sums[r][c], w[c], two);
    }
  }
  const float *a_scale = args.a_scale + i, *c_scale = args.c_scale + i;
  __m512 w_scale[NR];
#pragma GCC unroll 4
  for (int c = 0; c < NR; ++c) w_scale[c] = _mm512_loadu_ps(args.w_scale + j + c * panel_outputs);
  float* const out = args.c + i * c_stride + j;
#pragma GCC unroll 12
  for (int r = 0; r < MR; ++r) {
    const __m512 scale = _mm512_set1_ps(a_scale[r]), before = _mm512_set1_ps(c_scale[r]);
#pragma GCC unroll 4
    for (int c = 0; c < NR; ++c) {
      add_scaled(out + r * c_stride + c * panel_outputs, sums[r][c],
                 _mm512_mul_ps(scale, w_scale[c]), before);
    }
  }
}

using tile_pointer = tile_of<int16_gemm_args>*;
constexpr tile_pointer tiles[tile_rows] = {tile<1, 4>, tile<2, 4>, tile<3, 4>,
                                           tile<4, 4>, tile<5, 4>, tile<6, 4>};
constexpr tile_pointer panel_tiles[panel_rows] = {
    tile<1, 1>, tile<2, 1>, tile<3, 1>, tile<4, 1>,  tile<5, 1>,  tile<6, 1>,
    tile<7, 1>, tile<8, 1>, tile<9, 1>, tile<10, 1>, tile<11, 1>, tile<12, 1>};

}  // namespace

void int16_gemm_avx512_vnni(const int16_gemm_args& args) {
  record_run(operation::int16_gemm, isa::avx512_vnni);
  assert(args.n % panel_outputs == 0 && args.k % 2 == 0);
  assert(args.k > 0 && args.k <= int16_gemm_max_k);
  int64_t j = 0;
  for (; j + four_panels <= args.n; j += four_panels) in_row_groups(args, j, tiles);
  for (; j < args.n; j += panel_outputs) in_row_groups(args, j, panel_tiles);
}

}  // namespace kt
