// quantize_rows for AVX2 (with F16C).
#include <immintrin.h>

#include <cassert>
#include <cstring>

#include "../isa.h"
#include "quantize.h"

namespace kt {
namespace {

constexpr int64_t block = 32;  // elements per step: four vectors in, one vector of int8 out

struct bf16_reader {
  using element = uint16_t;
  static __m256 load(const element* x) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
  }
};

struct fp16_reader {
  using element = uint16_t;
  static __m256 load(const element* x) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
  }
};

struct fp32_reader {
  using element = float;
  static __m256 load(const element* x) { return _mm256_loadu_ps(x); }
};

template <typename reader>
__m256i magnitude_max(const typename reader::element* x, __m256i amax) {
  const __m256i mask = _mm256_set1_epi32(0x7fffffff);
  for (int64_t i = 0; i < block; i += 8) {
    const __m256i bits = _mm256_castps_si256(reader::load(x + i));
    amax = _mm256_max_epi32(amax, _mm256_and_si256(bits, mask));
  }
  return amax;
}

int32_t horizontal_max(__m256i v) {
  __m128i m = _mm_max_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4e));
  m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0xb1));
  return _mm_cvtsi128_si32(m);
}

int32_t horizontal_sum(__m256i v) {
  __m128i s = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1));
  return _mm_cvtsi128_si32(s);
}

// Returns the 32 int8 values and adds their sum to `sum`.
template <typename reader>
__m256i quantize_block(const typename reader::element* x, __m256 inverse, __m256i* sum) {
  const __m256i q0 = _mm256_cvtps_epi32(_mm256_mul_ps(reader::load(x), inverse));
  const __m256i q1 = _mm256_cvtps_epi32(_mm256_mul_ps(reader::load(x + 8), inverse));
  const __m256i q2 = _mm256_cvtps_epi32(_mm256_mul_ps(reader::load(x + 16), inverse));
  const __m256i q3 = _mm256_cvtps_epi32(_mm256_mul_ps(reader::load(x + 24), inverse));
  const __m256i total = _mm256_add_epi32(_mm256_add_epi32(q0, q1), _mm256_add_epi32(q2, q3));
  *sum = _mm256_add_epi32(*sum, total);
  const __m256i packed = _mm256_packs_epi16(_mm256_packs_epi32(q0, q1), _mm256_packs_epi32(q2, q3));
  // The packs work within 128-bit halves; this puts the groups of four back in order.
  return _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}

template <typename reader>
void quantize_row(const typename reader::element* x, int64_t k, int64_t k_padded, int8_t* q,
                  float* scale, int32_t* sum) {
  const int64_t whole = k / block * block;
  typename reader::element tail[block] = {};
  memcpy(tail, x + whole, static_cast<size_t>(k - whole) * sizeof(tail[0]));

  __m256i amax_lanes = _mm256_setzero_si256();
  for (int64_t i = 0; i < whole; i += block) amax_lanes = magnitude_max<reader>(x + i, amax_lanes);
  const int32_t amax_bits = horizontal_max(magnitude_max<reader>(tail, amax_lanes));
  const float amax = _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(amax_bits)));
  const bool finite = amax_bits < 0x7f800000;
  *sum = 0;
  if (!finite || amax < quantize_amax_floor) {
    memset(q, 0, static_cast<size_t>(k_padded));
    *scale = finite ? 0.0f : __builtin_nanf("");
    return;
  }
  const __m256 inverse = _mm256_set1_ps(static_cast<float>(quantize_limit) / amax);
  __m256i total = _mm256_setzero_si256();
  for (int64_t i = 0; i < whole; i += block) {
    const __m256i values = quantize_block<reader>(x + i, inverse, &total);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(q + i), values);
  }
  if (whole < k_padded) {  // at least one block of 32 is left, since k_padded is a multiple of 64
    const __m256i values = quantize_block<reader>(tail, inverse, &total);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(q + whole), values);
    memset(q + whole + block, 0, static_cast<size_t>(k_padded - whole - block));
  }
  *scale = amax / static_cast<float>(quantize_limit);
  *sum = horizontal_sum(total);
}

// Eight columns of two rows, times their factors.
struct row_pair {
  __m256 even, odd;
};

template <bool scaled>
row_pair load_pair(const quantize_pairs_args& args, int64_t i, int64_t j) {
  if constexpr (!scaled) {
    const uint16_t* x = static_cast<const uint16_t*>(args.x) + i * args.columns + j * 2;
    const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
    const __m256i high = _mm256_set1_epi32(static_cast<int32_t>(0xffff0000u));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)),
            _mm256_castsi256_ps(_mm256_and_si256(pairs, high))};
  }
  const float* x = static_cast<const float*>(args.x) + i * args.columns + j;
  return {
      _mm256_mul_ps(_mm256_loadu_ps(x), _mm256_broadcast_ss(args.factor + i)),
      _mm256_mul_ps(_mm256_loadu_ps(x + args.columns), _mm256_broadcast_ss(args.factor + i + 1))};
}

template <bool scaled>
void quantize_columns(quantize_pairs_args args, int64_t j) {
  const __m256i mask = _mm256_set1_epi32(0x7fffffff);
  __m256i bits = _mm256_setzero_si256();
  for (int64_t i = 0; i < args.k; i += 2) {
    const row_pair rows = load_pair<scaled>(args, i, j);
    bits = _mm256_max_epi32(bits, _mm256_and_si256(_mm256_castps_si256(rows.even), mask));
    bits = _mm256_max_epi32(bits, _mm256_and_si256(_mm256_castps_si256(rows.odd), mask));
  }
  const __m256 amax = _mm256_castsi256_ps(bits), limit = _mm256_set1_ps(quantize_pairs_limit);
  const __m256i finite = _mm256_cmpgt_epi32(_mm256_set1_epi32(0x7f800000), bits);
  const __m256 zero = _mm256_cmp_ps(amax, _mm256_set1_ps(quantize_pairs_floor), _CMP_LT_OQ);
  const __m256i kept = _mm256_andnot_si256(_mm256_castps_si256(zero), finite);
  const __m256 inverse = _mm256_div_ps(limit, amax);
  for (int64_t i = 0; i < args.k; i += 2) {
    const row_pair rows = load_pair<scaled>(args, i, j);
    const __m256i even = _mm256_cvtps_epi32(_mm256_mul_ps(rows.even, inverse));
    const __m256i odd = _mm256_cvtps_epi32(_mm256_mul_ps(rows.odd, inverse));
    const __m256i pairs = _mm256_blend_epi16(even, _mm256_slli_epi32(odd, 16), 0xaa);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(args.q + i * args.columns + j * 2),
                        _mm256_and_si256(pairs, kept));
  }
  const __m256 scale = _mm256_andnot_ps(zero, _mm256_div_ps(amax, limit));
  const __m256 nan = _mm256_set1_ps(__builtin_nanf(""));
  _mm256_storeu_ps(args.scale + j, _mm256_blendv_ps(nan, scale, _mm256_castsi256_ps(finite)));
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

void quantize_rows_avx2(const quantize_rows_args& args) {
  record_run(operation::quantize_rows, isa::avx2);
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

void quantize_pairs_avx2(const quantize_pairs_args& args) {
  record_run(operation::quantize_pairs, isa::avx2);
  assert(args.k % 2 == 0 && args.columns % 8 == 0);
  for (int64_t j = 0; j < args.columns; j += 8) {
    if (args.factor) {
      quantize_columns<true>(args, j);
    } else {
      quantize_columns<false>(args, j);
    }
  }
}

void sum_groups_avx2(const sum_groups_args& args) {
  record_run(operation::sum_groups, isa::avx2);
  assert(args.group_size % 32 == 0);
  const int64_t groups = args.rows * (args.k / args.group_size);
  const int8_t* q = args.q;
  for (int64_t g = 0; g < groups; ++g) {
    __m256i sum = _mm256_setzero_si256();
    for (const int8_t* end = q + args.group_size; q < end; q += 32) {
      const __m256i values = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(q));
      const __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), values);
      sum = _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }
    args.sum[g] = horizontal_sum(sum);
  }
}

}  // namespace kt
