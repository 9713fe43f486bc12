// The steps of attention between its matrix products: tiles of keys go through them one by one.
//
// softmax_step: one tile of scores into weights, with the running maximum and sum of each column
// (online softmax: Milakov and Gimelshein, arXiv 1805.02867), in base 2.
//
//   x[i][j] = scores[i][j] * scale, or -infinity where i >= seen[j]
//   top = maximum[j], then for ascending i: x[i][j] > top ? x[i][j] : top
//   factor[j] = exp2(maximum[j] - top)
//   p[i][j] = exp2(x[i][j] - top), rounded to bf16 where p is asked for and not weights
//   sum[j] = sum[j] * factor[j] + (((0 + p[0][j]) + p[1][j]) + ...)
//   maximum[j] = top
//
// A maximum starts at no_maximum and a sum at 0. NaN does not move the maximum and makes the sum
// NaN. The weights summed are the rounded ones, if they are: what is
// divided by the sum adds up to 1.
//
// exp2, for x <= 0:
//
//   z = x < -127 ? -127 : x                              (a NaN passes through)
//   t = z + 1.5 * 2^23;  n = t - 1.5 * 2^23;  r = z - n  (n the nearest integer; r is exact)
//   p = ((((c0 * r + c1) * r + c2) * r + c3) * r + c4) * r + 1
//   exp2 = p * 2^n, where 2^-127 is 0
//
// c0 to c4 are the Remez polynomial for (2^r - 1) / r on [-1/2, 1/2], weighted for the least
// relative error of 2^r, then rounded: the relative error is below 4 * 2^-24, with the roundings
// of this evaluation (measured over two million r), and exp2(0) is 1. Below 2^-126 the result is 0.
//
// rescale_add:      acc[i][j] = acc[i][j] * factor[i] + x[i][j]
// widen_rows:       out[i][j] = q[i][j]
// dequantise_rows:  out[i][j] = q[i][j] * scale[i][j / group_size] rounded to bf16
// pair_rows:        rows of keys into the packed layout in which keys are the inputs of a product,
//                   packed[j / 16][i / 2][j % 16][i % 2] = x[i][j]  (bf16_gemm.h)
// transpose_pairs:  out[j][i] = x[i][j] for pairs of 16 bits
//
// Each operation is rounded to nearest even, none fused: the same bits on every instruction set,
// but for those of a NaN. Where it is rounded to bf16 every NaN becomes 0x7fc0.
#pragma once

#include <cstdint>

namespace kt {

constexpr float no_maximum = -3.402823466e38f;  // the lowest finite number

constexpr float exp2_low = -127.0f;
constexpr float exp2_round = 12582912.0f;  // 1.5 * 2^23
constexpr float exp2_c0 = 1.326472731e-3f;
constexpr float exp2_c1 = 9.671512991e-3f;
constexpr float exp2_c2 = 5.550733581e-2f;
constexpr float exp2_c3 = 2.402224243e-1f;
constexpr float exp2_c4 = 6.931470037e-1f;

struct softmax_step_args {
  int64_t keys;         // multiple of 2
  int64_t columns;      // multiple of 16
  const float* scores;  // [keys][columns]
  float scale;
  const int32_t* seen;  // [columns]
  float* maximum;       // [columns], updated
  float* sum;           // [columns], updated
  float* factor;        // [columns]
  uint16_t* p;          // [keys/2][columns][2]
  float* weights;       // [keys][columns], may be the scores; or nullptr: one of the two is given
};

struct rescale_add_args {
  int64_t rows;
  int64_t n;            // multiple of 16
  const float* factor;  // [rows]
  const float* x;       // [rows][x_stride]
  int64_t x_stride;
  float* acc;  // [rows][acc_stride]
  int64_t acc_stride;
};

struct dequantise_rows_args {
  int64_t rows;
  int64_t n;
  int64_t group_size;  // multiple of 16; the last group of a row may be shorter
  const int8_t* q;     // [rows][n]
  const float* scale;  // [rows][ceil(n / group_size)]
  uint16_t* out;       // [rows][out_stride]
  int64_t out_stride;
};

struct widen_rows_args {
  int64_t rows;
  int64_t n;
  const int8_t* q;  // [rows][n]
  uint16_t* out;    // int16 [rows][out_stride]
  int64_t out_stride;
};

struct pair_rows_args {
  int64_t rows;       // multiple of 2
  int64_t n;          // multiple of 16
  const uint16_t* x;  // [rows][x_stride]
  int64_t x_stride;
  uint16_t* packed;
};

struct transpose_pairs_args {
  int64_t rows;       // multiple of 8
  int64_t n;          // pairs in a row: multiple of 8
  const uint16_t* x;  // [rows][x_stride][2]
  int64_t x_stride;
  uint16_t* out;  // [n][out_stride][2]
  int64_t out_stride;
};

using softmax_step_fn = void(const softmax_step_args& args);
using rescale_add_fn = void(const rescale_add_args& args);
using dequantise_rows_fn = void(const dequantise_rows_args& args);
using widen_rows_fn = void(const widen_rows_args& args);
using pair_rows_fn = void(const pair_rows_args& args);
using transpose_pairs_fn = void(const transpose_pairs_args& args);

}  // namespace kt
