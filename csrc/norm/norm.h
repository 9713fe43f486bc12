// RMSNorm (arXiv 1910.07467) and sums of activations, both rounded as modules of transformers do.
//
//   rms_norm:  r = 1 / sqrt(sum_i x_i^2 / n + eps);  out_i = round(weight_i * round(x_i * r))
//   add_rows:  out_i = round(a_i + b_i)
//
// where `round` is to the type of all of them, bf16 or fp32; every NaN in bf16 is 0x7fc0. The rest
// is fp32, nothing fused. Squares are summed in eight lanes, i in lane i % 8, that end as
// ((0 + 4) + (2 + 6)) + ((1 + 5) + (3 + 7)).
#pragma once

#include <cstdint>

#include "../quantize/quantize.h"

namespace kt {

struct rms_norm_args {
  int64_t rows;
  int64_t n;
  const void* x;     // [rows][x_stride]
  int64_t x_stride;  // elements from one row to the next
  const void* weight;
  float eps;
  void* out;        // [rows][n]; may be x where x_stride is n
  float_type type;  // of all three: bf16 or fp32
};

struct add_rows_args {
  int64_t count;
  const void* a;
  const void* b;
  void* out;        // may be a or b
  float_type type;  // of all three: bf16 or fp32
};

using rms_norm_fn = void(const rms_norm_args& args);
using add_rows_fn = void(const add_rows_args& args);

}  // namespace kt
