// SwiGLU's activation: h = silu(g) * u, elementwise, in fp32.
//
//   silu(g) = g / (1 + e),  e = exp(-g)
//   z = clamp(-g, -87, 88), as (z < low ? low : z) and (z > high ? high : z): a NaN passes through
//   t = z * log2(e) + 1.5 * 2^23;  n = t - 1.5 * 2^23      (rounds to the nearest even integer)
//   r = (z - n * ln2_high) - n * ln2_low
//   p = ((((c0 * r + c1) * r + c2) * r + c3) * r + c4) * r + c5
//   e = (((p * (r * r)) + r) + 1) * 2^n
//   h = (g / (1 + e)) * u
//
// each operation rounded to nearest even, none fused. Outside the clamp silu(g) is g or below
// 2^-120 in magnitude. The constants are Cephes' expf (Moshier, netlib.org/cephes).
#pragma once

#include <cstdint>

namespace kt {

constexpr float silu_low = -87.0f;
constexpr float silu_high = 88.0f;
constexpr float silu_log2e = 1.44269504088896341f;
constexpr float silu_round = 12582912.0f;  // 1.5 * 2^23
constexpr float silu_ln2_high = 0.693359375f;
constexpr float silu_ln2_low = -2.12194440e-4f;
constexpr float silu_c0 = 1.9875691500e-4f;
constexpr float silu_c1 = 1.3981999507e-3f;
constexpr float silu_c2 = 8.3334519073e-3f;
constexpr float silu_c3 = 4.1665795894e-2f;
constexpr float silu_c4 = 1.6666665459e-1f;
constexpr float silu_c5 = 5.0000001201e-1f;

struct silu_mul_args {
  int64_t rows;
  int64_t n;          // multiple of 16
  const float* gate;  // [rows][tile_stride]
  const float* up;    // [rows][tile_stride]
  int64_t tile_stride;
  float* out;  // [rows][out_stride]
  int64_t out_stride;
};

using silu_mul_fn = void(const silu_mul_args& args);

}  // namespace kt
