// bf16_gemm for AVX2 with FMA: bf16 is the high half of fp32, so a shift or a mask widens it.
#include <immintrin.h>

#include <cassert>

#include "../isa.h"
#include "../lanes256.h"
#include "bf16_gemm.h"

namespace kt {
namespace {

// 6 x 2 sums, 2 vectors of weights, the mask, and what is broadcast: all 16 registers.
constexpr int64_t tile_rows = 6;
// So few rows take two panels at a time: 4 sums or more hide the latency of an FMA, and memory is
// read in two places at once.
constexpr int64_t few_rows = 3;
constexpr int64_t prefetch_bytes = 4096;  // as in int8_gemm/avx2.cpp
// Activations are widened once for all outputs, a block of rows and inputs at a time: 20 KiB, so
// that a panel's part of the block fits the first-level cache beside them.
constexpr int64_t block_rows = 4 * tile_rows;
constexpr int64_t block_k = 192;
constexpr int64_t few_k = 1536;

// An odd number of cache lines: rows in the same set of the cache are slow to read together.
constexpr int64_t stride_of(int64_t k) { return k + 16; }

__m256 even(__m256i pairs) { return _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)); }

__m256 odd(__m256i pairs) {
  const __m256i mask = _mm256_set1_epi32(static_cast<int32_t>(0xffff0000u));
  return _mm256_castsi256_ps(_mm256_and_si256(pairs, mask));
}

// sum += w * x. In this order and in this register: left to itself GCC starts with all loads, runs
// out of registers and copies sums.
void add_product(__m256& sum, __m256 w, __m256 x) {
  __asm__ volatile("vfmadd231ps %[x], %[w], %[sum]" : [sum] "+x"(sum) : [w] "x"(w), [x] "x"(x));
}

// Rows of fp32: inputs [k, k + count) of row indices from i on.
struct wide_block {
  const float* rows;
  int64_t i;
  int64_t k, count;
};

// MR rows of the block, from `row` on, times one input of a panel; x is the input's first.
template <int MR, int64_t stride>
void add_products(__m256 (&sums)[MR][2], __m256 w0, __m256 w1, const float* x) {
#pragma GCC unroll 8
  for (int r = 0; r < MR; ++r) {
    const __m256 value = _mm256_broadcast_ss(x + r * stride);
    add_product(sums[r][0], w0, value);
    add_product(sums[r][1], w1, value);
  }
}

// `panels` panels of 16 outputs, from output j on, for MR rows of the block, from `row` on.
template <int MR, int panels>
void tile(const gemm_args& args, const wide_block& block, int64_t row, int64_t j) {
  constexpr int64_t stride = stride_of(panels == 1 ? block_k : few_k);
  const int64_t panel = args.k * panel_outputs;
  const uint16_t* line =
      static_cast<const uint16_t*>(args.packed) + j * args.k + block.k * panel_outputs;
  float* const c = args.c + (block.i + row) * args.c_stride + j;
  __m256 sums[panels][MR][2];
#pragma GCC unroll 12
  for (int s = 0; s < panels * MR * 2; ++s) {
    const int p = s / 2 / MR, r = s / 2 % MR;
    const float* before = c + r * args.c_stride + (2 * p + s % 2) * 8;
    sums[p][r][s % 2] = block.k ? _mm256_loadu_ps(before) : _mm256_setzero_ps();
  }
  const float* x = block.rows + row * stride;
  for (const float* end = x + block.count; x < end; x += 2, line += 32) {
#pragma GCC unroll 2
    for (int p = 0; p < panels; ++p) {
      const uint16_t* w = line + p * panel;
      _mm_prefetch(reinterpret_cast<const char*>(w) + prefetch_bytes, _MM_HINT_T0);
      add_products<MR, stride>(sums[p], even(load(w)), even(load(w + 16)), x);
      add_products<MR, stride>(sums[p], odd(load(w)), odd(load(w + 16)), x + 1);
    }
  }
#pragma GCC unroll 12
  for (int s = 0; s < panels * MR * 2; ++s) {
    const int p = s / 2 / MR, r = s / 2 % MR;
    _mm256_storeu_ps(c + r * args.c_stride + (2 * p + s % 2) * 8, sums[p][r][s % 2]);
  }
}

using block_tile = void(const gemm_args&, const wide_block&, int64_t row, int64_t j);
constexpr block_tile* tiles[tile_rows] = {tile<1, 1>, tile<2, 1>, tile<3, 1>,
                                          tile<4, 1>, tile<5, 1>, tile<6, 1>};
constexpr block_tile* few_tiles[few_rows] = {tile<1, 2>, tile<2, 2>, tile<3, 2>};

// The first `rows` rows of a block times every panel: in groups as equal as possible, or, where
// they are few, times two panels at once.
using block_product = void(const gemm_args&, const wide_block&, int64_t rows);

void many(const gemm_args& args, const wide_block& block, int64_t rows) {
  for (int64_t j = 0; j < args.n; j += panel_outputs) {
    int64_t groups = (rows + tile_rows - 1) / tile_rows;
    for (int64_t row = 0; row < rows; --groups) {
      const int64_t count = (rows - row + groups - 1) / groups;
      tiles[count - 1](args, block, row, j);
      row += count;
    }
  }
}

void few(const gemm_args& args, const wide_block& block, int64_t rows) {
  for (int64_t j = 0; j < args.n; j += 2 * panel_outputs) few_tiles[rows - 1](args, block, 0, j);
}

void widen(const uint16_t* x, int64_t count, float* out) {
  for (int64_t k = 0; k < count; k += 8) _mm256_storeu_ps(out + k, load_bf16(x + k));
}

template <int64_t most_rows, int64_t most_k>
void by_blocks(const gemm_args& args, block_product* multiply) {
  alignas(64) float wide[most_rows * stride_of(most_k)];
  const uint16_t* a = static_cast<const uint16_t*>(args.a);
  int64_t blocks = (args.m + most_rows - 1) / most_rows;
  for (int64_t i = 0; i < args.m; --blocks) {
    const int64_t rows = (args.m - i + blocks - 1) / blocks;
    for (int64_t k = 0; k < args.k; k += most_k) {
      const int64_t count = args.k - k < most_k ? args.k - k : most_k;
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t row = args.rows ? args.rows[i + r] : i + r;
        widen(a + row * args.k + k, count, wide + r * stride_of(most_k));
      }
      multiply(args, {wide, i, k, count}, rows);
    }
    i += rows;
  }
}

}  // namespace

void bf16_gemm_avx2(const gemm_args& args) {
  record_run(operation::bf16_gemm, isa::avx2);
  assert(args.k > 0 && args.k % bf16_gemm_k_multiple == 0);
  assert(args.n % bf16_gemm_n_multiple == 0);
  if (args.m <= few_rows && args.n % (2 * panel_outputs) == 0) {
    by_blocks<few_rows, few_k>(args, few);
  } else {
    by_blocks<block_rows, block_k>(args, many);
  }
}

}  // namespace kt
