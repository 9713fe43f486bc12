// int4_gemm for AVX-512 VNNI: vpdpbusd, exact, with weights as the unsigned operand.
//
// A weight is w + 8 in [0, 15], so sums of 32 bits start at -8 * sum(a) for each group; see
// int8_gemm/avx512_vnni.cpp.
#include <immintrin.h>

#include <cassert>

#include "../isa.h"
#include "../lanes512.h"
#include "../row_groups.h"
#include "int4_gemm.h"

namespace kt {
namespace {

// 6 x 4 sums, 4 lines of weights and the mask: 29 of 32 registers. The fp32 totals are touched once
// per group and lie in c.
constexpr int tile_rows = 6;

__m512 load_scales(const uint16_t* scale) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(0xffff, scale));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

// NR panels of 16 outputs for MR rows that start at row index i.
template <int MR, int NR>
void tile(const gemm_args& args, int64_t i, int64_t j) {
  const int64_t k = args.k;
  const int64_t groups = k / args.group_size;
  const int64_t panel_bytes = k * panel_outputs / 2;
  const uint8_t* line = static_cast<const uint8_t*>(args.packed) + j * k / 2;
  const uint16_t* scale = static_cast<const uint16_t*>(args.w_scale) + j * groups;
  const __m512i low = _mm512_set1_epi8(15);
  int64_t row[MR];
  const int8_t* a[MR];
#pragma GCC unroll 8
  for (int r = 0; r < MR; ++r) {
    row[r] = args.rows ? args.rows[i + r] : i + r;
    a[r] = static_cast<const int8_t*>(args.a) + row[r] * k;
  }
  int64_t kk = 0;
  for (int64_t g = 0; g < groups; ++g, scale += panel_outputs) {
    accumulators sums[MR][NR];
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r) {
      const int32_t zero = -int4_zero * args.a_sum[row[r] * groups + g];
#pragma GCC unroll 8
      for (int c = 0; c < NR; ++c) sums[r][c] = accumulators{} + zero;
    }
    const int64_t end = kk + args.group_size;
    do {
      __m512i w[NR];
#pragma GCC unroll 8
      for (int c = 0; c < NR; ++c) {
        w[c] = _mm512_and_si512(_mm512_loadu_si512(line + c * panel_bytes), low);
      }
#pragma GCC unroll 8
      for (int r = 0; r < MR; ++r) {
        const __m512i four = broadcast4(a[r] + kk);
#pragma GCC unroll 8
        for (int c = 0; c < NR; ++c) sums[r][c] = dot4(sums[r][c], w[c], four);
      }
#pragma GCC unroll 8
      for (int c = 0; c < NR; ++c) {
        const __m512i both = _mm512_loadu_si512(line + c * panel_bytes);
        w[c] = _mm512_and_si512(_mm512_srli_epi32(both, 4), low);
      }
#pragma GCC unroll 8
      for (int r = 0; r < MR; ++r) {
        const __m512i four = broadcast4(a[r] + kk + 4);
#pragma GCC unroll 8
        for (int c = 0; c < NR; ++c) sums[r][c] = dot4(sums[r][c], w[c], four);
      }
      kk += 8;
      line += 64;
    } while (kk < end);
#pragma GCC unroll 8
    for (int c = 0; c < NR; ++c) {
      const __m512 scales = load_scales(scale + c * panel_outputs * groups);
#pragma GCC unroll 8
      for (int r = 0; r < MR; ++r) {
        float* total = args.c + (i + r) * args.c_stride + j + c * panel_outputs;
        const __m512 before = g ? _mm512_loadu_ps(total) : _mm512_set1_ps(0.0f);
        _mm512_storeu_ps(total, _mm512_fmadd_ps(to_float(sums[r][c]), scales, before));
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < MR; ++r) {
    const __m512 a_scale = _mm512_set1_ps(args.a_scale[row[r]]);
#pragma GCC unroll 8
    for (int c = 0; c < NR; ++c) {
      float* total = args.c + (i + r) * args.c_stride + j + c * panel_outputs;
      _mm512_storeu_ps(total, _mm512_mul_ps(a_scale, _mm512_loadu_ps(total)));
    }
  }
}

template <int NR>
constexpr tile_fn* tiles[tile_rows] = {tile<1, NR>, tile<2, NR>, tile<3, NR>,
                                       tile<4, NR>, tile<5, NR>, tile<6, NR>};

}  // namespace

void int4_gemm_avx512_vnni(const gemm_args& args) {
  record_run(operation::int4_gemm, isa::avx512_vnni);
  assert(args.k > 0 && args.k % int4_gemm_k_multiple == 0 && args.k % args.group_size == 0);
  assert(args.n % gemm_n_multiple == 0);
  by_four_panels(args, tiles<4>, tiles<2>);
}

}  // namespace kt
