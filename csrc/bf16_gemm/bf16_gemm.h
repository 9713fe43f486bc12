// Product of bf16 activations with packed bf16 weights.
//
//   c[i][j] = sum_k a[row(i)][k] * w[j][k]
//
// in fp32, in whatever order and rounding the instruction set likes: what differs is within
// k * 2^-23 * sum_k |a * w|.
//
// Packed weights, the same for every instruction set: [n/16][k/2][16][2], that is lines of 64
// bytes, each with 2 consecutive k of 16 consecutive outputs; k is padded to 32.
//
// Arguments: a bf16; n a multiple of 16 (attention has 16 heads); a_scale, a_sum and w_scale are
// not used.
#pragma once

#include "../gemm.h"

namespace kt {

constexpr int64_t bf16_gemm_k_multiple = 32;
constexpr int64_t bf16_gemm_n_multiple = panel_outputs;

using bf16_gemm_fn = gemm_fn;

}  // namespace kt
