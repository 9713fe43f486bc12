// What every matrix product takes: rows of activations times packed weights, to fp32.
//
//   c[i][j] = sum_k a[row(i)][k] * w[j][k], with the scales that the format has
//
// The formulas, exact to the bit or not, and the layouts are in <format>_gemm/<format>_gemm.h. In
// every format 16 consecutive outputs make a panel, which is contiguous, and n is padded to 32
// with zeros; k is padded to what the format says, with zeros too.
#pragma once

#include <cstdint>

namespace kt {

constexpr int64_t gemm_n_multiple = 32;
constexpr int64_t panel_outputs = 16;
constexpr int64_t gemm_max_k = 131072;  // 127 * 127 * k < 2^31

struct gemm_args {
  int64_t m;
  int64_t n;            // multiple of gemm_n_multiple, or of what the format's header says
  int64_t k;            // as padded
  const int32_t* rows;  // [m] row(i), or nullptr: row(i) = i
  const void* a;        // [..][k]
  const float* a_scale;
  const int32_t* a_sum;
  const void* packed;   // the line of output 0, k 0
  const void* w_scale;  // of output 0
  int64_t group_size;   // weights that share a scale, where the format has groups
  float* c;             // [m][c_stride]
  int64_t c_stride;
};

using gemm_fn = void(const gemm_args& args);

}  // namespace kt
