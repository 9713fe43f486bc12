// int4_quantize in plain C++: the reference that the other file must equal bit for bit.
#include <bit>
#include <cassert>
#include <cmath>

#include "../float_types.h"
#include "../isa.h"
#include "int4_quantize.h"

namespace kt {
namespace {

constexpr int lanes = 8;
constexpr uint32_t infinity_bits = 0x7f800000u;
constexpr uint16_t bf16_nan = 0x7fc0;

float sum_lanes(const float* s) {
  return ((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7]));
}

float rounded(float r, float shrink) {
  const float q = std::nearbyint(r * shrink);
  return q < -8.0f ? -8.0f : q > 7.0f ? 7.0f : q;
}

float squared_error(const float* r, int64_t count, int choice) {
  float sums[lanes] = {};
  for (int64_t i = 0; i < count; ++i) {
    const float e = r[i] - rounded(r[i], int4_shrink[choice]) * int4_unshrink[choice];
    sums[i % lanes] += e * e;
  }
  return sum_lanes(sums);
}

uint16_t quantize_group(const float* w, int64_t count, int8_t* q) {
  float m = 0.0f;
  for (int64_t i = 0; i < count; ++i) {
    if ((std::bit_cast<uint32_t>(w[i]) & 0x7fffffffu) >= infinity_bits) return bf16_nan;
    if (std::fabs(w[i]) > std::fabs(m)) m = w[i];
  }
  if (std::fabs(m) < int4_floor) {
    for (int64_t i = 0; i < count; ++i) q[i] = 0;
    return 0;
  }
  float r[int4_max_group];
  for (int64_t i = 0; i < count; ++i) r[i] = w[i] * (-8.0f / m);
  int best = 0;
  float least = squared_error(r, count, 0);
  for (int choice = 1; choice < int4_shrinks; ++choice) {
    const float error = squared_error(r, count, choice);
    if (error < least) least = error, best = choice;
  }
  float products[lanes] = {}, squares[lanes] = {};
  for (int64_t i = 0; i < count; ++i) {
    const float value = rounded(r[i], int4_shrink[best]);
    products[i % lanes] += r[i] * value;
    squares[i % lanes] += value * value;
    q[i] = static_cast<int8_t>(value);
  }
  return float_to_bf16(sum_lanes(products) / sum_lanes(squares) * (m / -8.0f));
}

}  // namespace

void int4_quantize_portable(const int4_quantize_args& args) {
  record_run(operation::int4_quantize, isa::portable);
  assert(args.group_size % 32 == 0 && args.group_size <= int4_max_group);
  for (int64_t begin = 0; begin < args.k; begin += args.group_size) {
    float w[int4_max_group];
    for (int64_t i = 0; i < args.group_size; ++i) {
      w[i] = begin + i < args.k ? load_float(args.w, args.type, begin + i) : 0.0f;
    }
    args.scale[begin / args.group_size] = quantize_group(w, args.group_size, args.q + begin);
  }
}

}  // namespace kt
