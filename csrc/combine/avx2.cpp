// weighted_add and round_rows for AVX2.
#include <immintrin.h>

#include <cassert>
#include <cstring>

#include "../isa.h"
#include "../lanes256.h"
#include "combine.h"

namespace kt {
namespace {

void round8_bf16(const float* y, uint16_t* out) { store_bf16(out, _mm256_loadu_ps(y)); }

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
