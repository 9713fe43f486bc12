// The arithmetic steps of attention for AVX-512; those that only move data have no gain by it. No
// FMA, so that the bits are the portable ones.
#include <immintrin.h>

#include <cassert>

#include "../isa.h"
#include "attention.h"

namespace kt {
namespace {

constexpr int64_t lanes = 16;

__m512 multiply_add(__m512 a, __m512 b, float c) {
  return _mm512_add_ps(_mm512_mul_ps(a, b), _mm512_set1_ps(c));
}

__m512 exp2(__m512 x) {
  const __m512 round = _mm512_set1_ps(exp2_round);
  const __m512 z = _mm512_max_ps(_mm512_set1_ps(exp2_low), x);  // x where x is NaN
  const __m512 t = _mm512_add_ps(z, round);
  const __m512 r = _mm512_sub_ps(z, _mm512_sub_ps(t, round));
  __m512 p = _mm512_set1_ps(exp2_c0);
  p = multiply_add(p, r, exp2_c1);
  p = multiply_add(p, r, exp2_c2);
  p = multiply_add(p, r, exp2_c3);
  p = multiply_add(p, r, exp2_c4);
  p = multiply_add(p, r, 1.0f);
  const __m512i integer = _mm512_sub_epi32(_mm512_castps_si512(t), _mm512_castps_si512(round));
  const __m512i exponent = _mm512_slli_epi32(_mm512_add_epi32(integer, _mm512_set1_epi32(127)), 23);
  return _mm512_mul_ps(p, _mm512_castsi512_ps(exponent));
}

// Bf16 in the high 16 bits of each lane, the low ones zero: as floats, rounded.
__m512i round_bf16(__m512 y) {
  const __m512i bits = _mm512_castps_si512(y);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i sum = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __m512i high = _mm512_and_si512(sum, _mm512_set1_epi32(static_cast<int32_t>(0xffff0000u)));
  return _mm512_mask_blend_epi32(_mm512_cmp_ps_mask(y, y, _CMP_UNORD_Q), high,
                                 _mm512_set1_epi32(0x7fc00000));
}

// What softmax_step knows of sixteen columns.
struct columns16 {
  const float* scores;
  int64_t stride;
  __m512 scale;
  __m512i seen;

  __m512 x(int64_t i) const {
    const __mmask16 visible =
        _mm512_cmpgt_epi32_mask(seen, _mm512_set1_epi32(static_cast<int32_t>(i)));
    const __m512 scaled = _mm512_mul_ps(_mm512_loadu_ps(scores + i * stride), scale);
    return _mm512_mask_blend_ps(visible, _mm512_set1_ps(-__builtin_inff()), scaled);
  }
};

// Weights of sixteen columns, from the largest score of each on; returns their sums.
__m512 store_weights(const softmax_step_args& args, const columns16& column, __m512 top,
                     int64_t j) {
  __m512 sum = _mm512_set1_ps(0.0f);
  for (int64_t i = 0; i < args.keys; ++i) {
    const __m512 weight = exp2(_mm512_sub_ps(column.x(i), top));
    sum = _mm512_add_ps(sum, weight);
    _mm512_storeu_ps(args.weights + i * args.columns + j, weight);
  }
  return sum;
}

// The same, rounded to bf16.
__m512 store_pairs(const softmax_step_args& args, const columns16& column, __m512 top, int64_t j) {
  __m512 sum = _mm512_set1_ps(0.0f);
  for (int64_t i = 0; i < args.keys; i += 2) {
    const __m512i even = round_bf16(exp2(_mm512_sub_ps(column.x(i), top)));
    const __m512i odd = round_bf16(exp2(_mm512_sub_ps(column.x(i + 1), top)));
    sum = _mm512_add_ps(sum, _mm512_castsi512_ps(even));
    sum = _mm512_add_ps(sum, _mm512_castsi512_ps(odd));
    _mm512_storeu_si512(args.p + (i / 2 * args.columns + j) * 2,
                        _mm512_or_si512(_mm512_srli_epi32(even, 16), odd));
  }
  return sum;
}

void softmax16(const softmax_step_args& args, int64_t j) {
  const columns16 column{args.scores + j, args.columns, _mm512_set1_ps(args.scale),
                         _mm512_loadu_si512(args.seen + j)};
  const __m512 before = _mm512_loadu_ps(args.maximum + j);
  __m512 top = before;
  for (int64_t i = 0; i < args.keys; ++i) top = _mm512_max_ps(column.x(i), top);
  const __m512 sum =
      args.weights ? store_weights(args, column, top, j) : store_pairs(args, column, top, j);
  const __m512 factor = exp2(_mm512_sub_ps(before, top));
  const __m512 kept = _mm512_mul_ps(_mm512_loadu_ps(args.sum + j), factor);
  _mm512_storeu_ps(args.sum + j, _mm512_add_ps(kept, sum));
  _mm512_storeu_ps(args.factor + j, factor);
  _mm512_storeu_ps(args.maximum + j, top);
}

}  // namespace

void softmax_step_avx512_vnni(const softmax_step_args& args) {
  record_run(operation::softmax_step, isa::avx512_vnni);
  assert(args.keys % 2 == 0 && args.columns % lanes == 0);
  for (int64_t j = 0; j < args.columns; j += lanes) softmax16(args, j);
}

void rescale_add_avx512_vnni(const rescale_add_args& args) {
  record_run(operation::rescale_add, isa::avx512_vnni);
  assert(args.n % lanes == 0);
  for (int64_t i = 0; i < args.rows; ++i) {
    const __m512 factor = _mm512_set1_ps(args.factor[i]);
    const float* x = args.x + i * args.x_stride;
    float* acc = args.acc + i * args.acc_stride;
    for (int64_t j = 0; j < args.n; j += lanes) {
      const __m512 kept = _mm512_mul_ps(_mm512_loadu_ps(acc + j), factor);
      _mm512_storeu_ps(acc + j, _mm512_add_ps(kept, _mm512_loadu_ps(x + j)));
    }
  }
}

}  // namespace kt
