// Conversions between fp32 and the 16-bit float types, for portable code. Files compiled for one
// instruction set use that set's instructions instead.
#pragma once

#include <bit>
#include <cstdint>

#include "quantize/quantize.h"

namespace kt {

inline float bf16_to_float(uint16_t bits) {
  return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
}

// Round to nearest even; every NaN becomes 0x7fc0.
inline uint16_t float_to_bf16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// Exact. The exponent is moved by a multiplication, which also normalises subnormals.
inline float fp16_to_float(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(bits & 0x7fffu) << 13;
  if (magnitude >= 0x0f800000u) {  // infinity or NaN
    return std::bit_cast<float>(sign | 0x7f800000u | magnitude);
  }
  const float value = std::bit_cast<float>(magnitude) * 0x1p112f;
  return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(value));
}

inline float load_float(const void* x, float_type type, int64_t index) {
  switch (type) {
    case float_type::bf16:
      return bf16_to_float(static_cast<const uint16_t*>(x)[index]);
    case float_type::fp16:
      return fp16_to_float(static_cast<const uint16_t*>(x)[index]);
    case float_type::fp32:
      return static_cast<const float*>(x)[index];
  }
  return 0.0f;
}

// Rounds to nearest even; `type` is bf16 or fp32.
inline void store_float(void* out, float_type type, int64_t index, float value) {
  if (type == float_type::bf16) {
    static_cast<uint16_t*>(out)[index] = float_to_bf16(value);
  } else {
    static_cast<float*>(out)[index] = value;
  }
}

inline int64_t float_type_size(float_type type) { return type == float_type::fp32 ? 4 : 2; }

}  // namespace kt
