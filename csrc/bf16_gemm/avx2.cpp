// bf16_gemm for AVX2 with FMA: bf16 is the high half of fp32, so a shift or a mask widens it.
#include <immintrin.h>

#include <cassert>

#include "../isa.h"
#include "../lanes256.h"
#include "bf16_gemm.h"

namespace kt {
namespace {

// 5 x 2 sums, 2 vectors of weights and the mask, and what is broadcast. GCC spills with 6 rows.
constexpr int tile_rows = 5;
constexpr int64_t prefetch_bytes = 4096;  // as in int8_gemm/avx2.cpp
// Activations are widened once for all outputs, a block of rows and inputs at a time: 16 KiB, so
// that a panel's part of the block fits the first-level cache beside them.
constexpr int64_t block_rows = 4 * tile_rows;
constexpr int64_t block_values = 4096;

__m256 even(__m256i pairs) { return _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)); }

__m256 odd(__m256i pairs) {
  const __m256i mask = _mm256_set1_epi32(static_cast<int32_t>(0xffff0000u));
  return _mm256_castsi256_ps(_mm256_and_si256(pairs, mask));
}

// Loads stay below this line: GCC would start with all of them and run out of registers.
void keep_order() { __asm__ volatile("" ::: "memory"); }

// Rows of fp32, `stride` apart: inputs [k, k + count).
struct wide_block {
  const float* rows;
  int64_t stride;
  int64_t k, count;
};

// One panel of 16 outputs for MR rows of the block from `row` on; `i` is the first one's of c.
template <int MR>
void tile(const gemm_args& args, const wide_block& block, int64_t row, int64_t i, int64_t j) {
  const uint16_t* line =
      static_cast<const uint16_t*>(args.packed) + j * args.k + block.k * panel_outputs;
  const float* a[MR];
  float* c[MR];
  __m256 sums[MR][2];
#pragma GCC unroll 8
  for (int r = 0; r < MR; ++r) {
    a[r] = block.rows + (row + r) * block.stride;
    c[r] = args.c + (i + r) * args.c_stride + j;
    sums[r][0] = block.k ? _mm256_loadu_ps(c[r]) : _mm256_setzero_ps();
    sums[r][1] = block.k ? _mm256_loadu_ps(c[r] + 8) : _mm256_setzero_ps();
  }
  int64_t kk = 0;
  do {
    _mm_prefetch(reinterpret_cast<const char*>(line) + prefetch_bytes, _MM_HINT_T0);
    const __m256i* w = reinterpret_cast<const __m256i*>(line);
    const __m256 even0 = even(load(w)), even1 = even(load(w + 1));
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r) {
      const __m256 first = _mm256_broadcast_ss(a[r] + kk);
      sums[r][0] = _mm256_fmadd_ps(even0, first, sums[r][0]);
      sums[r][1] = _mm256_fmadd_ps(even1, first, sums[r][1]);
    }
    keep_order();
    const __m256 odd0 = odd(load(w)), odd1 = odd(load(w + 1));
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r) {
      const __m256 second = _mm256_broadcast_ss(a[r] + kk + 1);
      sums[r][0] = _mm256_fmadd_ps(odd0, second, sums[r][0]);
      sums[r][1] = _mm256_fmadd_ps(odd1, second, sums[r][1]);
    }
    kk += 2;
    line += 32;
  } while (kk < block.count);
#pragma GCC unroll 8
  for (int r = 0; r < MR; ++r) {
    _mm256_storeu_ps(c[r], sums[r][0]);
    _mm256_storeu_ps(c[r] + 8, sums[r][1]);
  }
}

using block_tile = void(const gemm_args&, const wide_block&, int64_t, int64_t, int64_t);
constexpr block_tile* tiles[tile_rows] = {tile<1>, tile<2>, tile<3>, tile<4>, tile<5>};

// Rows [i, i + rows), of equal groups as far as possible, times every panel.
void multiply_block(const gemm_args& args, const wide_block& block, int64_t i, int64_t rows) {
  for (int64_t j = 0; j < args.n; j += panel_outputs) {
    int64_t groups = (rows + tile_rows - 1) / tile_rows;
    for (int64_t row = 0; row < rows; --groups) {
      const int64_t count = (rows - row + groups - 1) / groups;
      tiles[count - 1](args, block, row, i + row, j);
      row += count;
    }
  }
}

void widen(const uint16_t* x, int64_t count, float* out) {
  for (int64_t k = 0; k < count; k += 8) _mm256_storeu_ps(out + k, load_bf16(x + k));
}

}  // namespace

void bf16_gemm_avx2(const gemm_args& args) {
  record_run(operation::bf16_gemm, isa::avx2);
  assert(args.k > 0 && args.k % bf16_gemm_k_multiple == 0);
  assert(args.n % bf16_gemm_n_multiple == 0);
  alignas(64) float wide[block_values];
  const uint16_t* a = static_cast<const uint16_t*>(args.a);
  for (int64_t i = 0; i < args.m; i += block_rows) {
    const int64_t rows = args.m - i < block_rows ? args.m - i : block_rows;
    const int64_t most = block_values / rows / bf16_gemm_k_multiple * bf16_gemm_k_multiple;
    for (int64_t k = 0; k < args.k; k += most) {
      const int64_t count = args.k - k < most ? args.k - k : most;
      for (int64_t r = 0; r < rows; ++r) {
        widen(a + (args.rows ? args.rows[i + r] : i + r) * args.k + k, count, wide + r * count);
      }
      multiply_block(args, {wide, count, k, count}, i, rows);
    }
  }
}

}  // namespace kt
