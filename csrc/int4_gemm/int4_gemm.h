// Product of int8 activations with packed int4 weights in groups along k (w4a8).
//
//   dot_g   = sum over k in group g of a[row(i)][k] * w[j][k]                      exact, int32
//   c[i][j] = a_scale[row(i)] * s_G,  s_g = fma(float(dot_g), w_scale[g][j], s_(g-1)),  s_(-1) = 0
//
// fp32, rounded to nearest even, groups in ascending order.
//
// Packed weights, the same for every instruction set: [n/16][k/8][16][4] bytes. A line of 64 bytes
// holds two lines of int8_gemm's layout: weights of the first four k in the low nibbles, of the
// next four in the high ones, each as w + 8 in [0, 15]. k is padded to 64 and to whole groups.
// Scales are bf16, [n/16][k/group_size][16].
//
// Arguments: a int8 in [-127, 127], a_scale one per row of a, a_sum [..][k/group_size] the sums of
// each row's groups (which undo the 8), group_size 32, 64 or 128.
#pragma once

#include "../gemm.h"

namespace kt {

constexpr int64_t int4_gemm_k_multiple = 64;
constexpr int32_t int4_zero = 8;

using int4_gemm_fn = gemm_fn;

}  // namespace kt
