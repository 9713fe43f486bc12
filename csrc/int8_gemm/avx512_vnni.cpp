// int8_gemm for AVX-512 VNNI: vpdpbusd, exact, with weights as the unsigned operand.
//
// vpdpbusd multiplies unsigned by signed bytes and adds four products to 32 bits, without
// saturation. w ^ 0x80 is w + 128 as an unsigned byte, so the instruction gives
// sum((w + 128) * a) = sum(w * a) + 128 * sum(a): accumulators start at -128 * sum(a). Intermediate
// values may wrap around 2^32, the result is exact. The shift costs one vpxor per line and tile.
#include <immintrin.h>

#include <cassert>

#include "../isa.h"
#include "../lanes512.h"
#include "../row_groups.h"
#include "int8_gemm.h"

namespace kt {
namespace {

// 6 x 4 accumulators, 4 lines of weights and the constant: 29 of 32 registers; activations are
// broadcast from memory by vpdpbusd itself.
constexpr int tile_rows = 6;
constexpr int shift = 128;

// NR panels of 16 outputs for MR rows that start at row index i.
template <int MR, int NR>
void tile(const gemm_args& args, int64_t i, int64_t j) {
  const int64_t k = args.k;
  const int64_t panel_bytes = k * panel_outputs;
  const __m512i flip = _mm512_set1_epi8(static_cast<char>(0x80));
  const float* w_scale = static_cast<const float*>(args.w_scale);
  int64_t row[MR];
  const int8_t* a[MR];
  accumulators sums[MR][NR];
#pragma GCC unroll 8
  for (int r = 0; r < MR; ++r) {
    row[r] = args.rows ? args.rows[i + r] : i + r;
    a[r] = static_cast<const int8_t*>(args.a) + row[r] * k;
#pragma GCC unroll 8
    for (int c = 0; c < NR; ++c) sums[r][c] = accumulators{} - shift * args.a_sum[row[r]];
  }
  const int8_t* line = static_cast<const int8_t*>(args.packed) + j * k;
  int64_t kk = 0;
  do {
    __m512i w[NR];
#pragma GCC unroll 8
    for (int c = 0; c < NR; ++c) {
      w[c] = _mm512_xor_si512(_mm512_loadu_si512(line + c * panel_bytes), flip);
    }
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r) {
      const __m512i four = broadcast4(a[r] + kk);
#pragma GCC unroll 8
      for (int c = 0; c < NR; ++c) sums[r][c] = dot4(sums[r][c], w[c], four);
    }
    kk += 4;
    line += 64;
  } while (kk < k);
#pragma GCC unroll 8
  for (int r = 0; r < MR; ++r) {
    const __m512 a_scale = _mm512_set1_ps(args.a_scale[row[r]]);
#pragma GCC unroll 8
    for (int c = 0; c < NR; ++c) {
      const int64_t column = j + c * panel_outputs;
      const __m512 scale = _mm512_mul_ps(a_scale, _mm512_loadu_ps(w_scale + column));
      const __m512 sum = to_float(sums[r][c]);
      _mm512_storeu_ps(args.c + (i + r) * args.c_stride + column, _mm512_mul_ps(sum, scale));
    }
  }
}

template <int NR>
constexpr tile_fn* tiles[tile_rows] = {tile<1, NR>, tile<2, NR>, tile<3, NR>,
                                       tile<4, NR>, tile<5, NR>, tile<6, NR>};

}  // namespace

void int8_gemm_avx512_vnni(const gemm_args& args) {
  record_run(operation::int8_gemm, isa::avx512_vnni);
  assert(args.k > 0 && args.k % int8_gemm_k_multiple == 0);
  assert(args.n % gemm_n_multiple == 0);
  by_four_panels(args, tiles<4>, tiles<2>);
}

}  // namespace kt
