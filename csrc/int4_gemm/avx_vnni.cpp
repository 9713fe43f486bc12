// int4_gemm for AVX-VNNI, the 256-bit vpdpbusd of processors without AVX-512: exact, with weights
// as the unsigned operand and sums that start at -8 * sum(a) for each group.
#include <immintrin.h>

#include <cassert>

#include "../isa.h"
#include "../lanes256.h"
#include "../row_groups.h"
#include "int4_gemm.h"

namespace kt {
namespace {

// 5 x 2 sums, 4 vectors of weights, the mask and a broadcast: 16 registers. The fp32 totals are
// touched once per group and lie in c.
constexpr int tile_rows = 5;

accumulators dot4(accumulators sums, __m256i w, __m256i a) {
  return reinterpret_cast<accumulators>(
      _mm256_dpbusd_avx_epi32(reinterpret_cast<__m256i>(sums), w, a));
}

// One panel of 16 outputs for MR rows that start at row index i.
template <int MR>
void tile(const gemm_args& args, int64_t i, int64_t j) {
  const int64_t k = args.k;
  const int64_t groups = k / args.group_size;
  const uint8_t* line = static_cast<const uint8_t*>(args.packed) + j * k / 2;
  const uint16_t* scale = static_cast<const uint16_t*>(args.w_scale) + j * groups;
  const __m256i low = _mm256_set1_epi8(15);
  int64_t row[MR];
  const int8_t* a[MR];
#pragma GCC unroll 8
  for (int r = 0; r < MR; ++r) {
    row[r] = args.rows ? args.rows[i + r] : i + r;
    a[r] = static_cast<const int8_t*>(args.a) + row[r] * k;
  }
  int64_t kk = 0;
  for (int64_t g = 0; g < groups; ++g, scale += panel_outputs) {
    accumulators sums[MR][2];
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r) {
      const int32_t zero = -int4_zero * args.a_sum[row[r] * groups + g];
      sums[r][0] = sums[r][1] = accumulators{} + zero;
    }
    const int64_t end = kk + args.group_size;
    do {
      const __m256i both0 = load(line);
      const __m256i both1 = load(line + 32);
      const __m256i first0 = _mm256_and_si256(both0, low);
      const __m256i first1 = _mm256_and_si256(both1, low);
      const __m256i second0 = _mm256_and_si256(_mm256_srli_epi32(both0, 4), low);
      const __m256i second1 = _mm256_and_si256(_mm256_srli_epi32(both1, 4), low);
#pragma GCC unroll 8
      for (int r = 0; r < MR; ++r) {
        const __m256i a0 = broadcast4(a[r] + kk);
        sums[r][0] = dot4(sums[r][0], first0, a0);
        sums[r][1] = dot4(sums[r][1], first1, a0);
        const __m256i a1 = broadcast4(a[r] + kk + 4);
        sums[r][0] = dot4(sums[r][0], second0, a1);
        sums[r][1] = dot4(sums[r][1], second1, a1);
      }
      kk += 8;
      line += 64;
    } while (kk < end);
    const __m256 scales[2] = {load_bf16(scale), load_bf16(scale + 8)};
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 2
      for (int c = 0; c < 2; ++c) {
        add_group(args.c + (i + r) * args.c_stride + j + 8 * c, sums[r][c], scales[c], g == 0);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < MR; ++r) {
    float* c = args.c + (i + r) * args.c_stride + j;
    multiply_by(c, args.a_scale[row[r]]);
    multiply_by(c + 8, args.a_scale[row[r]]);
  }
}

constexpr tile_fn* tiles[tile_rows] = {tile<1>, tile<2>, tile<3>, tile<4>, tile<5>};

}  // namespace

void int4_gemm_avx_vnni(const gemm_args& args) {
  record_run(operation::int4_gemm, isa::avx_vnni);
  assert(args.k > 0 && args.k % int4_gemm_k_multiple == 0 && args.k % args.group_size == 0);
  assert(args.n % gemm_n_multiple == 0);
  by_panel(args, tiles);
}

}  // namespace kt
