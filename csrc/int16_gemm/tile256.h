// int16_gemm in 256-bit registers, by what adds the products of a pair.
#pragma once

#include "../lanes256.h"
#include "../row_groups.h"
#include "int16_gemm.h"

namespace kt {
namespace {

// sums + w * a: two products of int16 in each lane.
using dot2_fn = accumulators(accumulators sums, __m256i w, __m256i a);

// 6 x 2 sums, a line of weights in two vectors, a broadcast and a product: all 16 registers.
constexpr int tile_rows = 6;

// c = c * before + sums * scale, eight outputs
void add_scaled(float* c, accumulators sums, __m256 scale, __m256 before) {
  const __m256 kept = _mm256_mul_ps(_mm256_loadu_ps(c), before);
  _mm256_storeu_ps(c, _mm256_add_ps(kept, _mm256_mul_ps(to_float(sums), scale)));
}

// One panel of 16 outputs for MR rows from row i on.
template <dot2_fn* dot2, int MR>
void tile(const int16_gemm_args& args, int64_t i, int64_t j) {
  const int64_t a_stride = args.a_stride, c_stride = args.c_stride;
  const uint16_t* a = args.a + i * a_stride;
  const uint16_t* line = args.packed + j * args.k;
  accumulators sums[MR][2] = {};
  for (const uint16_t* end = a + args.k; a < end; a += 2, line += 32) {
    const __m256i w0 = load(line), w1 = load(line + 16);
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r) {
      const __m256i two = broadcast4(a + r * a_stride);
      sums[r][0] = dot2(sums[r][0], w0, two);
      sums[r][1] = dot2(sums[r][1], w1, two);
    }
  }
  const float *a_scale = args.a_scale + i, *c_scale = args.c_scale + i;
  const __m256 scale0 = _mm256_loadu_ps(args.w_scale + j);
  const __m256 scale1 = _mm256_loadu_ps(args.w_scale + j + 8);
  float* const c = args.c + i * c_stride + j;
#pragma GCC unroll 8
  for (int r = 0; r < MR; ++r) {
    const __m256 scale = _mm256_broadcast_ss(a_scale + r);
    const __m256 before = _mm256_broadcast_ss(c_scale + r);
    add_scaled(c + r * c_stride, sums[r][0], _mm256_mul_ps(scale, scale0), before);
    add_scaled(c + r * c_stride + 8, sums[r][1], _mm256_mul_ps(scale, scale1), before);
  }
}

template <dot2_fn* dot2>
constexpr tile_of<int16_gemm_args>* tiles[tile_rows] = {
    tile<dot2, 1>, tile<dot2, 2>, tile<dot2, 3>, tile<dot2, 4>, tile<dot2, 5>, tile<dot2, 6>};

}  // namespace
}  // namespace kt
