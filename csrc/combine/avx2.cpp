// weighted_add and round_rows for AVX2.
#include <immintrin.h>

#include <cassert>
#include <cstring>

#include "../isa.h"
#include "combine.h"

namespace kt {
namespace {

// Eight values as bf16 in the low 16 bits of each lane.
__m256i to_bf16(__m256 y) {
  const __m256i bits = _mm256_castps_si256(y);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_srli_epi32(
      _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(y, y, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), is_nan);
}

void round8_bf16(const float* y, uint16_t* out) {
  const __m256i lanes = to_bf16(_mm256_loadu_ps(y));
  const __m128i packed =
      _mm_packus_epi32(_mm256_castsi256_si128(lanes), _mm256_extracti128_si256(lanes, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), packed);
}

void round8_fp32(const float* y, float* out) {
  const __m256 value = _mm256_loadu_ps(y);
  const __m256 is_nan = _mm256_cmp_ps(value, value, _CMP_UNORD_Q);
  _mm256_storeu_ps(out, _mm256_blendv_ps(value, _mm256_set1_ps(__builtin_nanf("")), is_nan));
}

template <typename element, void (*round8)(const float*, element*)>
void round_all(const round_rows_args& args) {
  const int64_t whole = args.n / 8 * 8;
  const size_t rest = static_cast<size_t>(args.n - whole);
  for (int64_t row = 0; row < args.rows; ++row) {
    const float* y = args.y + row * args.y_stride;
    element* out = static_cast<element*>(args.out) + row * args.out_stride;
    for (int64_t j = 0; j < whole; j += 8) round8(y + j, out + j);
    if (rest == 0) continue;
    float y_tail[8] = {};
    element out_tail[8];
    memcpy(y_tail, y + whole, rest * sizeof(float));
    round8(y_tail, out_tail);
    memcpy(out + whole, out_tail, rest * sizeof(element));
  }
}

}  // namespace

void weighted_add_avx2(const weighted_add_args& args) {
  record_run(operation::weighted_add, isa::avx2);
  assert(args.n % 16 == 0);
  for (int64_t i = 0; i < args.rows; ++i) {
    const __m256 weight = _mm256_set1_ps(args.weight[i]);
    const float* d = args.d + i * args.d_stride;
    float* y = args.y + args.token[i] * args.y_stride;
    for (int64_t j = 0; j < args.n; j += 8) {
      const __m256 product = _mm256_mul_ps(weight, _mm256_loadu_ps(d + j));
      _mm256_storeu_ps(y + j, _mm256_add_ps(_mm256_loadu_ps(y + j), product));
    }
  }
}

void round_rows_avx2(const round_rows_args& args) {
  record_run(operation::round_rows, isa::avx2);
  if (args.type == float_type::bf16) {
    round_all<uint16_t, round8_bf16>(args);
  } else {
    round_all<float, round8_fp32>(args);
  }
}

}  // namespace kt
