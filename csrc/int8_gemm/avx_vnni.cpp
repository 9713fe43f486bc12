// int8_gemm for AVX-VNNI, the 256-bit vpdpbusd of processors without AVX-512: exact, with weights
// as the unsigned operand and sums that start at -128 * sum(a); see avx512_vnni.cpp.
#include <immintrin.h>

#include <cassert>

#include "../isa.h"
#include "../lanes256.h"
#include "../row_groups.h"
#include "int8_gemm.h"

namespace kt {
namespace {

// 6 x 2 sums, a line of weights in two vectors, the constant and a broadcast fill the 16 registers.
constexpr int tile_rows = 6;
constexpr int shift = 128;

accumulators dot4(accumulators sums, __m256i w, __m256i a) {
  return reinterpret_cast<accumulators>(
      _mm256_dpbusd_avx_epi32(reinterpret_cast<__m256i>(sums), w, a));
}

// One panel of 16 outputs for MR rows that start at row index i.
template <int MR>
void tile(const gemm_args& args, int64_t i, int64_t j) {
  const int64_t k = args.k;
  const float* w_scale = static_cast<const float*>(args.w_scale) + j;
  const __m256i flip = _mm256_set1_epi8(static_cast<char>(0x80));
  int64_t row[MR];
  const int8_t* a[MR];
  accumulators sums[MR][2];
#pragma GCC unroll 8
  for (int r = 0; r < MR; ++r) {
    row[r] = args.rows ? args.rows[i + r] : i + r;
    a[r] = static_cast<const int8_t*>(args.a) + row[r] * k;
    sums[r][0] = sums[r][1] = accumulators{} - shift * args.a_sum[row[r]];
  }
  const int8_t* line = static_cast<const int8_t*>(args.packed) + j * k;
  int64_t kk = 0;
  do {
    const __m256i w0 = _mm256_xor_si256(load(line), flip);
    const __m256i w1 = _mm256_xor_si256(load(line + 32), flip);
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r) {
      const __m256i four = broadcast4(a[r] + kk);
      sums[r][0] = dot4(sums[r][0], w0, four);
      sums[r][1] = dot4(sums[r][1], w1, four);
    }
    kk += 4;
    line += 64;
  } while (kk < k);
#pragma GCC unroll 8
  for (int r = 0; r < MR; ++r) {
    float* c = args.c + (i + r) * args.c_stride + j;
    store_scaled(c, sums[r][0], args.a_scale[row[r]], w_scale);
    store_scaled(c + 8, sums[r][1], args.a_scale[row[r]], w_scale + 8);
  }
}

constexpr tile_fn* tiles[tile_rows] = {tile<1>, tile<2>, tile<3>, tile<4>, tile<5>, tile<6>};

}  // namespace

void int8_gemm_avx_vnni(const gemm_args& args) {
  record_run(operation::int8_gemm, isa::avx_vnni);
  assert(args.k > 0 && args.k % int8_gemm_k_multiple == 0);
  assert(args.n % gemm_n_multiple == 0);
  by_panel(args, tiles);
}

}  // namespace kt
