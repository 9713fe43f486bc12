// quantize_rows for AVX-512.
#include <immintrin.h>

#include <cassert>
#include <cstring>

#include "../isa.h"
#include "quantize.h"

namespace kt {
namespace {

constexpr int64_t lanes = 16;

// Each reader loads the lanes in `mask` as fp32, zero elsewhere.
struct bf16_reader {
  using element = uint16_t;
  static __m512 load(const element* x, __mmask16 mask) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, x));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
  }
};

struct fp16_reader {
  using element = uint16_t;
  static __m512 load(const element* x, __mmask16 mask) {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, x));
  }
};

struct fp32_reader {
  using element = float;
  static __m512 load(const element* x, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, x); }
};

__mmask16 first_lanes(int64_t count) {
  return static_cast<__mmask16>(count >= lanes ? 0xffff : (1 << count) - 1);
}

template <typename reader>
int32_t row_amax_bits(const typename reader::element* x, int64_t k) {
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  __m512i amax = _mm512_setzero_si512();
  for (int64_t i = 0; i < k; i += lanes) {
    const __m512i bits = _mm512_castps_si512(reader::load(x + i, first_lanes(k - i)));
    amax = _mm512_max_epi32(amax, _mm512_and_si512(bits, magnitude));
  }
  return _mm512_reduce_max_epi32(amax);
}

template <typename reader>
void quantize_row(const typename reader::element* x, int64_t k, int64_t k_padded, int8_t* q,
                  float* scale, int32_t* sum) {
  const int32_t amax_bits = row_amax_bits<reader>(x, k);
  float amax;
  memcpy(&amax, &amax_bits, sizeof(amax));
  const bool finite = amax_bits < 0x7f800000;
  *sum = 0;
  if (!finite || amax < quantize_amax_floor) {
    memset(q, 0, static_cast<size_t>(k_padded));
    *scale = finite ? 0.0f : __builtin_nanf("");
    return;
  }
  const __m512 inverse = _mm512_set1_ps(static_cast<float>(quantize_limit) / amax);
  __m512i total = _mm512_setzero_si512();
  int64_t i = 0;
  for (; i < k; i += lanes) {
    const __m512 value = reader::load(x + i, first_lanes(k - i));
    const __m512i integer = _mm512_cvtps_epi32(_mm512_mul_ps(value, inverse));
    total = _mm512_add_epi32(total, integer);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(q + i), _mm512_cvtepi32_epi8(integer));
  }
  memset(q + i, 0, static_cast<size_t>(k_padded - i));
  *scale = amax / static_cast<float>(quantize_limit);
  *sum = _mm512_reduce_add_epi32(total);
}

template <typename reader>
void quantize_all(const quantize_rows_args& args) {
  const auto* x = static_cast<const typename reader::element*>(args.x);
  for (int64_t row = 0; row < args.rows; ++row) {
    quantize_row<reader>(x + row * args.x_stride, args.k, args.k_padded,
                         args.q + row * args.k_padded, args.scale + row, args.sum + row);
  }
}

}  // namespace

void quantize_rows_avx512_vnni(const quantize_rows_args& args) {
  record_run(operation::quantize_rows, isa::avx512_vnni);
  assert(args.k_padded % 64 == 0 && args.k <= args.k_padded);
  switch (args.type) {
    case float_type::bf16:
      return quantize_all<bf16_reader>(args);
    case float_type::fp16:
      return quantize_all<fp16_reader>(args);
    case float_type::fp32:
      return quantize_all<fp32_reader>(args);
  }
}

void sum_groups_avx512_vnni(const sum_groups_args& args) {
  record_run(operation::sum_groups, isa::avx512_vnni);
  assert(args.group_size % 32 == 0);
  // Half a vector at a time: groups may be as small as 32.
  const int64_t groups = args.rows * (args.k / args.group_size);
  const int8_t* q = args.q;
  for (int64_t g = 0; g < groups; ++g) {
    __m512i sum = _mm512_setzero_si512();
    for (const int8_t* end = q + args.group_size; q < end; q += 32) {
      const __m512i values = _mm512_maskz_loadu_epi32(0xff, q);
      sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(1), values);
    }
    args.sum[g] = _mm512_reduce_add_epi32(sum);
  }
}

}  // namespace kt
