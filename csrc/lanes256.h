// What matrix products in 256-bit registers share; see row_groups.h.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace kt {
namespace {

// Eight sums. Carried through a loop as __m256i (64-bit lanes) they are copied at each addition by
// GCC 12, and those copies do not fit the registers.
using accumulators = int32_t __attribute__((vector_size(32)));

[[maybe_unused]] __m256i load(const void* line) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(line));
}

[[maybe_unused]] __m256i broadcast4(const void* a) {
  int32_t four;
  memcpy(&four, a, sizeof(four));
  return _mm256_set1_epi32(four);
}

[[maybe_unused]] __m256 to_float(accumulators sums) {
  return _mm256_cvtepi32_ps(reinterpret_cast<__m256i>(sums));
}

[[maybe_unused]] __m256 load_bf16(const uint16_t* x) {
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

// Eight values as bf16 in the low 16 bits of each lane; every NaN becomes 0x7fc0.
[[maybe_unused]] __m256i to_bf16(__m256 y) {
  const __m256i bits = _mm256_castps_si256(y);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_srli_epi32(
      _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(y, y, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), is_nan);
}

[[maybe_unused]] __m256 rounded_to_bf16(__m256 y) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(to_bf16(y), 16));
}

[[maybe_unused]] void store_bf16(uint16_t* out, __m256 y) {
  const __m256i lanes = to_bf16(y);
  const __m128i packed =
      _mm_packus_epi32(_mm256_castsi256_si128(lanes), _mm256_extracti128_si256(lanes, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), packed);
}

// ((0 + 4) + (2 + 6)) + ((1 + 5) + (3 + 7))
[[maybe_unused]] float sum_of_lanes(__m256 lanes) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps(lanes, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}

// c = sums * (a_scale * w_scale), eight outputs (int8_gemm.h)
[[maybe_unused]] void store_scaled(float* c, accumulators sums, float a_scale,
                                   const float* w_scale) {
  const __m256 scale = _mm256_mul_ps(_mm256_set1_ps(a_scale), _mm256_loadu_ps(w_scale));
  _mm256_storeu_ps(c, _mm256_mul_ps(to_float(sums), scale));
}

// c = sums * scale + (c, or 0 for the first group), eight outputs (int4_gemm.h)
[[maybe_unused]] void add_group(float* c, accumulators sums, __m256 scale, bool first) {
  const __m256 before = first ? _mm256_setzero_ps() : _mm256_loadu_ps(c);
  _mm256_storeu_ps(c, _mm256_fmadd_ps(to_float(sums), scale, before));
}

[[maybe_unused]] void multiply_by(float* c, float scale) {
  _mm256_storeu_ps(c, _mm256_mul_ps(_mm256_set1_ps(scale), _mm256_loadu_ps(c)));
}

}  // namespace
}  // namespace kt
