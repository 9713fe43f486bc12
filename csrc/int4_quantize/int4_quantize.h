// int4 quantisation of groups of weights, with a search for the scale of least squared error.
//
// The weight m of largest magnitude (the first such) becomes about -8, the largest magnitude that
// four bits have, so that scales may be negative:
//
//   r_i   = w_i * (-8 / m)
//   q_i   = clamp(round(r_i * f), -8, 7)            for each f of int4_shrink
//   error = sum_i (r_i - q_i * (1 / f))^2           the f of least error is taken, the first such
//   scale = bf16((sum_i r_i q_i / sum_i q_i^2) * (m / -8))     the least squares for these q
//
// fp32, each operation rounded to nearest even, none fused; sums in eight lanes, lane l adding
// i = l, l + 8, ... in ascending order, then ((0+4)+(2+6)) + ((1+5)+(3+7)). A group whose |m| is
// below 2^-100 is zeros with scale 0; one with a NaN or an infinity has scale NaN.
#pragma once

#include <cstdint>

#include "../quantize/quantize.h"

namespace kt {

constexpr int int4_shrinks = 9;
// (7 + i / 2) / 8 and the reciprocals: the scale that is too large for the largest weight, and so
// rounds the others coarsely, against one that clips it. On normal weights nine steps come within
// 0.5 % of the error of a much finer search.
constexpr float int4_shrink[int4_shrinks] = {0.875f,  0.9375f, 1.0f,    1.0625f, 1.125f,
                                             1.1875f, 1.25f,   1.3125f, 1.375f};
constexpr float int4_unshrink[int4_shrinks] = {1 / 0.875f,  1 / 0.9375f, 1.0f,
                                               1 / 1.0625f, 1 / 1.125f,  1 / 1.1875f,
                                               1 / 1.25f,   1 / 1.3125f, 1 / 1.375f};
constexpr float int4_floor = 0x1p-100f;
constexpr int64_t int4_max_group = 128;

struct int4_quantize_args {
  int64_t k;           // weights of one output; those beyond, up to whole groups, count as zero
  int64_t group_size;  // multiple of 32, at most int4_max_group
  const void* w;       // [k] of `type`
  float_type type;
  int8_t* q;        // [k rounded up to whole groups]
  uint16_t* scale;  // one bf16 per group
};

using int4_quantize_fn = void(const int4_quantize_args& args);

}  // namespace kt
