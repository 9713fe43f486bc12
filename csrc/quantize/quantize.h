// Symmetric int8 quantisation of rows: activations per token, weights per output channel; and sums
// of what comes out.
//
//   amax  = max_i |x_i|, compared as integers on the bit patterns: a NaN is larger than all else
//   scale = amax / 127
//   q_i   = round_to_nearest_even(x_i * (127 / amax)), in [-127, 127]
//   sum   = sum_i q_i
//
// in fp32, each operation rounded to nearest even, nothing fused. |x_i| * fl(127 / amax) is at most
// 127 (1 + 2^-23), which rounds to 127: no clamp is needed. A row whose amax is below 2^-120 (where
// 127 / amax overflows) is a row of zeros with scale 0. A row with a NaN or an infinity has q = 0
// and scale = NaN, so that whatever is computed from it is NaN, and nothing else is.
#pragma once

#include <cstdint>

namespace kt {

enum class float_type : uint8_t { bf16, fp16, fp32 };

constexpr float quantize_amax_floor = 0x1p-120f;
constexpr int32_t quantize_limit = 127;

struct quantize_rows_args {
  int64_t rows;
  int64_t k;
  int64_t k_padded;  // multiple of 64; q[k..k_padded) is set to zero
  const void* x;     // [rows][x_stride]
  int64_t x_stride;  // elements from one row to the next
  float_type type;
  int8_t* q;     // [rows][k_padded]
  float* scale;  // [rows]
  int32_t* sum;  // [rows]
};

using quantize_rows_fn = void(const quantize_rows_args& args);

//   sum[row][g] = sum of q[row][g * group_size .. (g + 1) * group_size)
struct sum_groups_args {
  int64_t rows;
  int64_t k;           // multiple of group_size
  int64_t group_size;  // multiple of 32
  const int8_t* q;     // [rows][k]
  int32_t* sum;        // [rows][k / group_size]
};

using sum_groups_fn = void(const sum_groups_args& args);

}  // namespace kt
