// int4_quantize for AVX2 (with F16C).
#include <immintrin.h>

#include <cassert>
#include <cstring>

#include "../isa.h"
#include "int4_quantize.h"

namespace kt {
namespace {

constexpr int64_t lanes = 8;
constexpr int32_t infinity_bits = 0x7f800000;
constexpr uint16_t bf16_nan = 0x7fc0;

__m256 load8(const void* w, float_type type, int64_t i) {
  if (type == float_type::fp32) return _mm256_loadu_ps(static_cast<const float*>(w) + i);
  const __m128i half =
      _mm_loadu_si128(reinterpret_cast<const __m128i*>(static_cast<const uint16_t*>(w) + i));
  if (type == float_type::fp16) return _mm256_cvtph_ps(half);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

// Eight weights from i on; those at k and beyond are zero.
__m256 load_weights(const int4_quantize_args& args, int64_t i) {
  if (i + lanes <= args.k) return load8(args.w, args.type, i);
  const size_t size = args.type == float_type::fp32 ? 4 : 2;
  char tail[lanes * 4] = {};
  if (i < args.k) {
    memcpy(tail, static_cast<const char*>(args.w) + static_cast<size_t>(i) * size,
           static_cast<size_t>(args.k - i) * size);
  }
  return load8(tail, args.type, 0);
}

float sum_lanes(__m256 v) {
  const __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 pair = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(pair, _mm_shuffle_ps(pair, pair, 1)));
}

__m256 rounded(__m256 r, float shrink) {
  const __m256 q = _mm256_round_ps(_mm256_mul_ps(r, _mm256_set1_ps(shrink)),
                                   _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  return _mm256_min_ps(_mm256_max_ps(q, _mm256_set1_ps(-8.0f)), _mm256_set1_ps(7.0f));
}

// The first weight of the largest magnitude, and its bits; NaN and infinity are larger than all.
float largest(const float* w, int64_t count, int32_t* magnitude) {
  const __m256i mask = _mm256_set1_epi32(0x7fffffff);
  __m256i most = _mm256_setzero_si256();
  for (int64_t i = 0; i < count; i += lanes) {
    const __m256i bits = _mm256_castps_si256(_mm256_loadu_ps(w + i));
    most = _mm256_max_epi32(most, _mm256_and_si256(bits, mask));
  }
  __m128i m = _mm_max_epi32(_mm256_castsi256_si128(most), _mm256_extracti128_si256(most, 1));
  m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4e));
  m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0xb1));
  *magnitude = _mm_cvtsi128_si32(m);
  const __m256i wanted = _mm256_set1_epi32(*magnitude);
  for (int64_t i = 0;; i += lanes) {
    const __m256i bits = _mm256_and_si256(_mm256_castps_si256(_mm256_loadu_ps(w + i)), mask);
    const int found = _mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpeq_epi32(bits, wanted)));
    if (found) return w[i + __builtin_ctz(static_cast<unsigned>(found))];
  }
}

uint16_t to_bf16(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

uint16_t quantize_group(const float* w, int64_t count, int8_t* q) {
  int32_t magnitude;
  const float m = largest(w, count, &magnitude);
  if (magnitude >= infinity_bits) return bf16_nan;
  if (__builtin_fabsf(m) < int4_floor) {
    memset(q, 0, static_cast<size_t>(count));
    return 0;
  }
  const __m256 to_r = _mm256_set1_ps(-8.0f / m);
  __m256 errors[int4_shrinks] = {};
  for (int64_t i = 0; i < count; i += lanes) {
    const __m256 r = _mm256_mul_ps(_mm256_loadu_ps(w + i), to_r);
#pragma GCC unroll 9
    for (int choice = 0; choice < int4_shrinks; ++choice) {
      const __m256 value = rounded(r, int4_shrink[choice]);
      const __m256 e =
          _mm256_sub_ps(r, _mm256_mul_ps(value, _mm256_set1_ps(int4_unshrink[choice])));
      errors[choice] = _mm256_add_ps(errors[choice], _mm256_mul_ps(e, e));
    }
  }
  int best = 0;
  float least = sum_lanes(errors[0]);
  for (int choice = 1; choice < int4_shrinks; ++choice) {
    const float error = sum_lanes(errors[choice]);
    if (error < least) least = error, best = choice;
  }
  __m256 products = _mm256_setzero_ps(), squares = _mm256_setzero_ps();
  for (int64_t i = 0; i < count; i += lanes) {
    const __m256 r = _mm256_mul_ps(_mm256_loadu_ps(w + i), to_r);
    const __m256 value = rounded(r, int4_shrink[best]);
    products = _mm256_add_ps(products, _mm256_mul_ps(r, value));
    squares = _mm256_add_ps(squares, _mm256_mul_ps(value, value));
    const __m256i wide = _mm256_cvtps_epi32(value);
    const __m128i words =
        _mm_packs_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(q + i), _mm_packs_epi16(words, words));
  }
  return to_bf16(sum_lanes(products) / sum_lanes(squares) * (m / -8.0f));
}

}  // namespace

void int4_quantize_avx2(const int4_quantize_args& args) {
  record_run(operation::int4_quantize, isa::avx2);
  assert(args.group_size % 32 == 0 && args.group_size <= int4_max_group);
  for (int64_t begin = 0; begin < args.k; begin += args.group_size) {
    float w[int4_max_group];
    for (int64_t i = 0; i < args.group_size; i += lanes) {
      _mm256_storeu_ps(w + i, load_weights(args, begin + i));
    }
    args.scale[begin / args.group_size] = quantize_group(w, args.group_size, args.q + begin);
  }
}

}  // namespace kt
