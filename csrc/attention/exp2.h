// exp2 of attention.h in plain C++, for what is not compiled for one instruction set.
#pragma once

#include <bit>
#include <cstdint>

#include "attention.h"

namespace kt {

inline float attention_exp2(float x) {
  const float z = x < exp2_low ? exp2_low : x;
  const float t = z + exp2_round;
  const float r = z - (t - exp2_round);
  float p = exp2_c0;
  p = p * r + exp2_c1;
  p = p * r + exp2_c2;
  p = p * r + exp2_c3;
  p = p * r + exp2_c4;
  p = p * r + 1.0f;
  // The low bits of t hold n; unsigned, because a NaN's bits may overflow the addition.
  const uint32_t exponent =
      (std::bit_cast<uint32_t>(t) - std::bit_cast<uint32_t>(exp2_round) + 127u) << 23;
  return p * std::bit_cast<float>(exponent);
}

}  // namespace kt
