// weighted_add and round_rows for AVX-512.
#include <immintrin.h>

#include <cassert>

#include "../isa.h"
#include "combine.h"

namespace kt {
namespace {

constexpr int64_t lanes = 16;

__mmask16 first_lanes(int64_t count) {
  return static_cast<__mmask16>(count >= lanes ? 0xffff : (1 << count) - 1);
}

__mmask16 nan_lanes(__m512 y) { return _mm512_cmp_ps_mask(y, y, _CMP_UNORD_Q); }

__m256i to_bf16(__m512 y) {
  const __m512i bits = _mm512_castps_si512(y);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_srli_epi32(
      _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  return _mm512_cvtepi32_epi16(
      _mm512_mask_blend_epi32(nan_lanes(y), rounded, _mm512_set1_epi32(0x7fc0)));
}

void round_row_bf16(const float* y, int64_t n, uint16_t* out) {
  for (int64_t j = 0; j < n; j += lanes) {
    const __mmask16 mask = first_lanes(n - j);
    _mm256_mask_storeu_epi16(out + j, mask, to_bf16(_mm512_maskz_loadu_ps(mask, y + j)));
  }
}

void round_row_fp32(const float* y, int64_t n, float* out) {
  const __m512 nan = _mm512_set1_ps(__builtin_nanf(""));
  for (int64_t j = 0; j < n; j += lanes) {
    const __mmask16 mask = first_lanes(n - j);
    const __m512 value = _mm512_maskz_loadu_ps(mask, y + j);
    _mm512_mask_storeu_ps(out + j, mask, _mm512_mask_blend_ps(nan_lanes(value), value, nan));
  }
}

}  // namespace

void weighted_add_avx512_vnni(const weighted_add_args& args) {
  record_run(operation::weighted_add, isa::avx512_vnni);
  assert(args.n % 16 == 0);
  for (int64_t i = 0; i < args.rows; ++i) {
    const __m512 weight = _mm512_set1_ps(args.weight[i]);
    const float* d = args.d + i * args.d_stride;
    float* y = args.y + args.token[i] * args.y_stride;
    for (int64_t j = 0; j < args.n; j += lanes) {
      const __m512 product = _mm512_mul_ps(weight, _mm512_loadu_ps(d + j));
      _mm512_storeu_ps(y + j, _mm512_add_ps(_mm512_loadu_ps(y + j), product));
    }
  }
}

void round_rows_avx512_vnni(const round_rows_args& args) {
  record_run(operation::round_rows, isa::avx512_vnni);
  for (int64_t row = 0; row < args.rows; ++row) {
    const float* y = args.y + row * args.y_stride;
    if (args.type == float_type::bf16) {
      round_row_bf16(y, args.n, static_cast<uint16_t*>(args.out) + row * args.out_stride);
    } else {
      round_row_fp32(y, args.n, static_cast<float*>(args.out) + row * args.out_stride);
    }
  }
}

}  // namespace kt
