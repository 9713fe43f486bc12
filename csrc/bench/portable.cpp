// Peaks of plain C++: what the compiler makes of the references' inner loops.
#include "../isa.h"
#include "peak.h"

namespace kt {

peak_result int8_peak_portable(int64_t iterations) {
  record_run(operation::int8_peak, isa::portable);
  constexpr int lanes = 64;
  int8_t a[lanes], w[lanes];
  int32_t sums[lanes / 4] = {};
  for (int i = 0; i < lanes; ++i) {
    a[i] = static_cast<int8_t>(i);
    w[i] = static_cast<int8_t>(lanes - i);
  }
  for (int64_t it = 0; it < iterations; ++it) {
    a[it % lanes] = static_cast<int8_t>(it & 63);
    for (int j = 0; j < lanes / 4; ++j) {
      for (int i = 0; i < 4; ++i) sums[j] += int32_t{a[4 * j + i]} * int32_t{w[4 * j + i]};
    }
  }
  int32_t guard = 0;
  for (int32_t sum : sums) guard ^= sum;
  return {iterations * lanes * 2, guard, "C++ multiply and add"};
}

peak_result int4_peak_portable(int64_t iterations) {
  record_run(operation::int4_peak, isa::portable);
  return int8_peak_portable(iterations);
}

peak_result bf16_peak_portable(int64_t iterations) {
  record_run(operation::bf16_peak, isa::portable);
  constexpr int lanes = 16;
  float a[lanes], sums[lanes];
  for (int i = 0; i < lanes; ++i) a[i] = sums[i] = static_cast<float>(i) * 1e-3f;
  for (int64_t it = 0; it < iterations; ++it) {
    a[it % lanes] = static_cast<float>(it & 63) * 1e-3f;
    for (int i = 0; i < lanes; ++i) sums[i] = sums[i] * 0.5f + a[i];
  }
  float guard = 0;
  for (float sum : sums) guard += sum;
  return {iterations * lanes * 2, static_cast<int32_t>(guard), "C++ multiply and add"};
}

}  // namespace kt
