// Product of int16 activations with packed int16 weights, added to what is there.
//
//   c[i][j] = c[i][j] * c_scale[i] + float(sum_k a[i][k] * w[j][k]) * (a_scale[i] * w_scale[j])
//
// Sums are exact in 32 bits where one of the two is in [-127, 127] and k is at most
// int16_gemm_max_k. The rest is fp32, each operation rounded to nearest even, none fused: the same
// bits on every instruction set.
//
// Packed weights as in bf16_gemm.h: [n/16][k/2][16][2].
#pragma once

#include "../gemm.h"

namespace kt {

constexpr int64_t int16_gemm_max_k = 512;  // 127 * 32767 * k < 2^31

struct int16_gemm_args {
  int64_t m;
  int64_t n;          // multiple of panel_outputs
  int64_t k;          // multiple of 2
  const uint16_t* a;  // int16 [m][a_stride]
  int64_t a_stride;
  const float* a_scale;    // [m]
  const uint16_t* packed;  // int16
  const float* w_scale;    // [n]
  const float* c_scale;    // [m]
  float* c;                // [m][c_stride]
  int64_t c_stride;
};

using int16_gemm_fn = void(const int16_gemm_args& args);

}  // namespace kt
