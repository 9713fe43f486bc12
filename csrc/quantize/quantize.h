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

// The same in 16 bits, column by column, of fp32 with a factor for each row or of bf16 pairs:
//
//   amax[j]  = max_i |x[i][j] * factor[i]|
//   scale[j] = amax[j] / 32767
//   q[i / 2][j][i % 2] = round_to_nearest_even(x[i][j] * factor[i] * (32767 / amax[j]))
//
// with zeros, and what is not finite, as above; a column is zeros below 2^-110.
constexpr float quantize_pairs_floor = 0x1p-110f;
constexpr float quantize_pairs_limit = 32767.0f;

struct quantize_pairs_args {
  int64_t k;            // multiple of 2
  int64_t columns;      // multiple of 8
  const void* x;        // fp32 [k][columns]; where there are no factors bf16 [k/2][columns][2]
  const float* factor;  // [k], or nullptr
  uint16_t* q;          // int16 [k/2][columns][2], may be x
  float* scale;         // [columns]
};

using quantize_pairs_fn = void(const quantize_pairs_args& args);

}  // namespace kt
