// Weighted sum of experts' outputs and its rounding to the output type.
//
//   weighted_add:  y[token(i)][j] = y[token(i)][j] + weight[i] * d[i][j]
//   round_rows:    out[t][j] = y[t][j] rounded to nearest even; any NaN becomes the one quiet NaN
//                  0x7fc00000 (fp32) or 0x7fc0 (bf16), whose bits do not depend on operand order
//
// product and sum each rounded to fp32. The caller adds rows in ascending expert index, and an
// expert that a token names twice in ascending slot.
#pragma once

#include <cstdint>

#include "../quantize/quantize.h"

namespace kt {

struct weighted_add_args {
  int64_t rows;
  int64_t n;             // multiple of 16
  const int32_t* token;  // [rows]
  const float* weight;   // [rows]
  const float* d;        // [rows][d_stride]
  int64_t d_stride;
  float* y;  // [tokens][y_stride]
  int64_t y_stride;
};

struct round_rows_args {
  int64_t rows;
  int64_t n;
  const float* y;  // [rows][y_stride]
  int64_t y_stride;
  void* out;  // [rows][out_stride] of `type`
  int64_t out_stride;
  float_type type;  // bf16 or fp32
};

using weighted_add_fn = void(const weighted_add_args& args);
using round_rows_fn = void(const round_rows_args& args);

}  // namespace kt
