// silu_mul in plain C++: the reference that the other files must equal bit for bit.
#include <bit>
#include <cassert>

#include "../isa.h"
#include "silu.h"

namespace kt {
namespace {

float silu(float g) {
  float z = -g;
  z = z < silu_low ? silu_low : z;
  z = z > silu_high ? silu_high : z;
  const float t = z * silu_log2e + silu_round;
  const float n = t - silu_round;
  const float r = (z - n * silu_ln2_high) - n * silu_ln2_low;
  float p = silu_c0;
  p = p * r + silu_c1;
  p = p * r + silu_c2;
  p = p * r + silu_c3;
  p = p * r + silu_c4;
  p = p * r + silu_c5;
  // The low bits of t hold n; unsigned, because a NaN's bits may overflow the addition.
  const uint32_t exponent =
      (std::bit_cast<uint32_t>(t) - std::bit_cast<uint32_t>(silu_round) + 127u) << 23;
  const float e = ((p * (r * r) + r) + 1.0f) * std::bit_cast<float>(exponent);
  return g / (1.0f + e);
}

}  // namespace

void silu_mul_portable(const silu_mul_args& args) {
  record_run(operation::silu_mul, isa::portable);
  assert(args.n % 16 == 0);
  for (int64_t row = 0; row < args.rows; ++row) {
    const float* gate = args.gate + row * args.tile_stride;
    const float* up = args.up + row * args.tile_stride;
    float* out = args.out + row * args.out_stride;
    for (int64_t j = 0; j < args.n; ++j) out[j] = silu(gate[j]) * up[j];
  }
}

}  // namespace kt
