// int4_gemm for AVX2: vpmaddubsw with weights as the unsigned operand, summed in 16 bits.
//
// A weight is w + 8 in [0, 15], so a pair of products is at most 2 * 15 * 127 = 3810 in magnitude
// and eight of them, 30480, fit 16 bits: per 32 k one widening (vpmaddwd) does. The sums of the
// weights' zero point, 8 * sum(a), are taken off once per group.
#include <immintrin.h>

#include <cassert>

#include "../isa.h"
#include "../lanes256.h"
#include "../row_groups.h"
#include "int4_gemm.h"

namespace kt {
namespace {

// 4 x 2 sums of 16 bits, 2 vectors of weights, constants and temporaries fit the 16 registers; sums
// of 32 bits are touched once per 32 k, the fp32 totals, in c, once per group.
constexpr int tile_rows = 4;
constexpr int few_rows = 1;               // as in int8_gemm/avx2.cpp; two rows gain nothing
constexpr int64_t step = 32;              // k per widening
constexpr int64_t prefetch_bytes = 4096;  // as there

using sums16 = int16_t __attribute__((vector_size(32)));  // as `accumulators`, and for its reason

sums16 dot2(__m256i w, __m256i a) { return reinterpret_cast<sums16>(_mm256_maddubs_epi16(w, a)); }

// These sums are made before what follows is loaded: GCC would multiply all rows first and add
// later, and run out of registers.
void keep_order(sums16& first, sums16& second) {
  __asm__ volatile("" : "+x"(first), "+x"(second)::"memory");
}

__m256i high_nibbles(__m256i both, __m256i low) {
  return _mm256_and_si256(_mm256_srli_epi16(both, 4), low);
}

// `panels` panels of 16 outputs for MR rows that start at row index i.
template <int MR, int panels>
void tile(const gemm_args& args, int64_t i, int64_t j) {
  const int64_t k = args.k;
  const int64_t groups = k / args.group_size;
  const uint8_t* line = static_cast<const uint8_t*>(args.packed) + j * k / 2;
  const uint16_t* scale = static_cast<const uint16_t*>(args.w_scale) + j * groups;
  const __m256i low = _mm256_set1_epi8(15);
  const __m256i ones = _mm256_set1_epi16(1);
  int64_t row[MR];
  const int8_t* a[MR];
#pragma GCC unroll 8
  for (int r = 0; r < MR; ++r) {
    row[r] = args.rows ? args.rows[i + r] : i + r;
    a[r] = static_cast<const int8_t*>(args.a) + row[r] * k;
  }
  int64_t kk = 0;
  for (int64_t g = 0; g < groups; ++g, scale += panel_outputs) {
    accumulators sums[panels][MR][2];
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r) {
      const int32_t zero = -int4_zero * args.a_sum[row[r] * groups + g];
#pragma GCC unroll 2
      for (int p = 0; p < panels; ++p) sums[p][r][0] = sums[p][r][1] = accumulators{} + zero;
    }
    for (const int64_t end = kk + args.group_size; kk < end;) {
      sums16 pairs[panels][MR][2] = {};
#pragma GCC unroll 1
      for (const int64_t step_end = kk + step; kk < step_end; kk += 8, line += 64) {
#pragma GCC unroll 2
        for (int p = 0; p < panels; ++p) {
          const uint8_t* at = line + p * panel_outputs * k / 2;
          _mm_prefetch(at + prefetch_bytes, _MM_HINT_T0);
          const __m256i* w = reinterpret_cast<const __m256i*>(at);
          const __m256i first0 = _mm256_and_si256(load(w), low);
          const __m256i first1 = _mm256_and_si256(load(w + 1), low);
#pragma GCC unroll 8
          for (int r = 0; r < MR; ++r) {
            const __m256i four = broadcast4(a[r] + kk);
            pairs[p][r][0] += dot2(first0, four);
            pairs[p][r][1] += dot2(first1, four);
            keep_order(pairs[p][r][0], pairs[p][r][1]);
          }
          const __m256i second0 = high_nibbles(load(w), low);
          const __m256i second1 = high_nibbles(load(w + 1), low);
#pragma GCC unroll 8
          for (int r = 0; r < MR; ++r) {
            const __m256i four = broadcast4(a[r] + kk + 4);
            pairs[p][r][0] += dot2(second0, four);
            pairs[p][r][1] += dot2(second1, four);
            keep_order(pairs[p][r][0], pairs[p][r][1]);
          }
        }
      }
#pragma GCC unroll 8
      for (int s = 0; s < panels * MR * 2; ++s) {
        const int p = s / 2 / MR, r = s / 2 % MR;
        sums[p][r][s % 2] += reinterpret_cast<accumulators>(
            _mm256_madd_epi16(reinterpret_cast<__m256i>(pairs[p][r][s % 2]), ones));
      }
    }
#pragma GCC unroll 2
    for (int p = 0; p < panels; ++p) {
      const uint16_t* of_panel = scale + p * panel_outputs * groups;
      const __m256 scales[2] = {load_bf16(of_panel), load_bf16(of_panel + 8)};
      float* const c = args.c + i * args.c_stride + j + p * panel_outputs;
#pragma GCC unroll 8
      for (int r = 0; r < MR; ++r) {
        add_group(c + r * args.c_stride, sums[p][r][0], scales[0], g == 0);
        add_group(c + r * args.c_stride + 8, sums[p][r][1], scales[1], g == 0);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < MR; ++r) {
    float* c = args.c + (i + r) * args.c_stride + j;
    for (int64_t n = 0; n < panels * panel_outputs; n += 8) {
      multiply_by(c + n, args.a_scale[row[r]]);
    }
  }
}

constexpr tile_fn* tiles[tile_rows] = {tile<1, 1>, tile<2, 1>, tile<3, 1>, tile<4, 1>};
constexpr tile_fn* few_tiles[few_rows] = {tile<1, 2>};

}  // namespace

void int4_gemm_avx2(const gemm_args& args) {
  record_run(operation::int4_gemm, isa::avx2);
  assert(args.k > 0 && args.k % int4_gemm_k_multiple == 0 && args.k % args.group_size == 0);
  assert(args.n % gemm_n_multiple == 0 && args.group_size % step == 0);
  by_panel_or_two(args, tiles, few_tiles);
}

}  // namespace kt
