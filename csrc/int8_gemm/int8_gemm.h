// Product of int8 activations with packed int8 weights, scaled to fp32 (w8a8).
//
//   c[i][j] = float(sum_k a[row(i)][k] * w[j][k]) * (a_scale[row(i)] * w_scale[j])
//
// The sum is exact in int32 (127 * 127 * k < 2^31 for k <= gemm_max_k), its conversion and the two
// products are fp32, rounded to nearest even.
//
// Packed weights, the same for every instruction set: [n/16][k/4][16][4], that is lines of 64
// bytes, each with 4 consecutive k of 16 consecutive outputs; k is padded to 64.
//
// Arguments: a int8 in [-127, 127], a_scale one per row of a, a_sum the sum of each row of a,
// w_scale fp32 [n].
#pragma once

#include "../gemm.h"

namespace kt {

constexpr int64_t int8_gemm_k_multiple = 64;

using int8_gemm_fn = gemm_fn;

}  // namespace kt
