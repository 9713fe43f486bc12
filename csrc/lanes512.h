// What matrix products in 512-bit registers share; see row_groups.h.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace kt {
namespace {

// Sixteen sums. Carried through a loop as __m512i (64-bit lanes) they are copied twice per
// instruction by GCC 12, and those copies do not fit the registers.
using accumulators = int32_t __attribute__((vector_size(64)));

[[maybe_unused]] accumulators dot4(accumulators sums, __m512i w, __m512i a) {
  return reinterpret_cast<accumulators>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sums), w, a));
}

[[maybe_unused]] __m512i broadcast4(const void* a) {
  int32_t four;
  memcpy(&four, a, sizeof(four));
  return _mm512_set1_epi32(four);
}

[[maybe_unused]] __m512 to_float(accumulators sums) {
  return _mm512_cvtepi32_ps(reinterpret_cast<__m512i>(sums));
}

}  // namespace
}  // namespace kt
