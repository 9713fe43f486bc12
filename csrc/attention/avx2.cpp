// The steps of attention for AVX2. No FMA, so that the bits are the portable ones.
#include <immintrin.h>

#include <cassert>
#include <cstring>

#include "../isa.h"
#include "attention.h"

namespace kt {
namespace {

__m256 multiply_add(__m256 a, __m256 b, float c) {
  return _mm256_add_ps(_mm256_mul_ps(a, b), _mm256_set1_ps(c));
}

__m256 exp2(__m256 x) {
  const __m256 round = _mm256_set1_ps(exp2_round);
  const __m256 z = _mm256_max_ps(_mm256_set1_ps(exp2_low), x);  // x where x is NaN
  const __m256 t = _mm256_add_ps(z, round);
  const __m256 r = _mm256_sub_ps(z, _mm256_sub_ps(t, round));
  __m256 p = _mm256_set1_ps(exp2_c0);
  p = multiply_add(p, r, exp2_c1);
  p = multiply_add(p, r, exp2_c2);
  p = multiply_add(p, r, exp2_c3);
  p = multiply_add(p, r, exp2_c4);
  p = multiply_add(p, r, 1.0f);
  const __m256i integer = _mm256_sub_epi32(_mm256_castps_si256(t), _mm256_castps_si256(round));
  const __m256i exponent = _mm256_slli_epi32(_mm256_add_epi32(integer, _mm256_set1_epi32(127)), 23);
  return _mm256_mul_ps(p, _mm256_castsi256_ps(exponent));
}

// Eight values as bf16 in the high 16 bits of each lane, the low ones zero: as floats, rounded.
__m256i round_bf16(__m256 y) {
  const __m256i bits = _mm256_castps_si256(y);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i sum = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i high = _mm256_set1_epi32(static_cast<int32_t>(0xffff0000u));
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(y, y, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(_mm256_and_si256(sum, high), _mm256_set1_epi32(0x7fc00000), is_nan);
}

// What softmax_step knows of eight columns.
struct columns8 {
  const float* scores;
  int64_t stride;
  __m256 scale;
  __m256i seen;

  __m256 x(int64_t i) const {
    const __m256 visible =
        _mm256_castsi256_ps(_mm256_cmpgt_epi32(seen, _mm256_set1_epi32(static_cast<int32_t>(i))));
    const __m256 scaled = _mm256_mul_ps(_mm256_loadu_ps(scores + i * stride), scale);
    return _mm256_blendv_ps(_mm256_set1_ps(-__builtin_inff()), scaled, visible);
  }
};

// Weights of eight columns, from the largest score of each on; returns their sums.
__m256 store_weights(const softmax_step_args& args, const columns8& column, __m256 top, int64_t j) {
  __m256 sum = _mm256_setzero_ps();
  for (int64_t i = 0; i < args.keys; ++i) {
    const __m256 weight = exp2(_mm256_sub_ps(column.x(i), top));
    sum = _mm256_add_ps(sum, weight);
    _mm256_storeu_ps(args.weights + i * args.columns + j, weight);
  }
  return sum;
}

// The same, rounded to bf16.
__m256 store_pairs(const softmax_step_args& args, const columns8& column, __m256 top, int64_t j) {
  __m256 sum = _mm256_setzero_ps();
  for (int64_t i = 0; i < args.keys; i += 2) {
    const __m256i even = round_bf16(exp2(_mm256_sub_ps(column.x(i), top)));
    const __m256i odd = round_bf16(exp2(_mm256_sub_ps(column.x(i + 1), top)));
    sum = _mm256_add_ps(sum, _mm256_castsi256_ps(even));
    sum = _mm256_add_ps(sum, _mm256_castsi256_ps(odd));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(args.p + (i / 2 * args.columns + j) * 2),
                        _mm256_or_si256(_mm256_srli_epi32(even, 16), odd));
  }
  return sum;
}

void softmax8(const softmax_step_args& args, int64_t j) {
  const columns8 column{args.scores + j, args.columns, _mm256_set1_ps(args.scale),
                        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(args.seen + j))};
  const __m256 before = _mm256_loadu_ps(args.maximum + j);
  __m256 top = before;
  for (int64_t i = 0; i < args.keys; ++i) top = _mm256_max_ps(column.x(i), top);
  const __m256 sum =
      args.weights ? store_weights(args, column, top, j) : store_pairs(args, column, top, j);
  const __m256 factor = exp2(_mm256_sub_ps(before, top));
  const __m256 kept = _mm256_mul_ps(_mm256_loadu_ps(args.sum + j), factor);
  _mm256_storeu_ps(args.sum + j, _mm256_add_ps(kept, sum));
  _mm256_storeu_ps(args.factor + j, factor);
  _mm256_storeu_ps(args.maximum + j, top);
}

// 16 values, each times scale and rounded to bf16.
void dequantise16(const int8_t* q, __m256 scale, uint16_t* out) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(q));
  const __m256 low = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
  const __m256 high = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8)));
  const __m256i packed =
      _mm256_packus_epi32(_mm256_srli_epi32(round_bf16(_mm256_mul_ps(low, scale)), 16),
                          _mm256_srli_epi32(round_bf16(_mm256_mul_ps(high, scale)), 16));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_permute4x64_epi64(packed, 0xd8));
}

// 8 x 8 transposition of 32-bit lanes.
void transpose8(const transpose_pairs_args& args, int64_t i, int64_t j) {
  __m256 in[8], two[8];
#pragma GCC unroll 8
  for (int64_t r = 0; r < 8; ++r) {
    in[r] = _mm256_castsi256_ps(_mm256_loadu_si256(
        reinterpret_cast<const __m256i*>(args.x + ((i + r) * args.x_stride + j) * 2)));
  }
#pragma GCC unroll 4
  for (int r = 0; r < 8; r += 2) {
    two[r] = _mm256_unpacklo_ps(in[r], in[r + 1]);
    two[r + 1] = _mm256_unpackhi_ps(in[r], in[r + 1]);
  }
#pragma GCC unroll 2
  for (int r = 0; r < 8; r += 4) {
    in[r] = _mm256_shuffle_ps(two[r], two[r + 2], 0x44);
    in[r + 1] = _mm256_shuffle_ps(two[r], two[r + 2], 0xee);
    in[r + 2] = _mm256_shuffle_ps(two[r + 1], two[r + 3], 0x44);
    in[r + 3] = _mm256_shuffle_ps(two[r + 1], two[r + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int64_t r = 0; r < 4; ++r) {
    const __m256 low = _mm256_permute2f128_ps(in[r], in[r + 4], 0x20);
    const __m256 high = _mm256_permute2f128_ps(in[r], in[r + 4], 0x31);
    uint16_t* out = args.out + ((j + r) * args.out_stride + i) * 2;
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_castps_si256(low));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 4 * args.out_stride * 2),
                        _mm256_castps_si256(high));
  }
}

}  // namespace

void softmax_step_avx2(const softmax_step_args& args) {
  record_run(operation::softmax_step, isa::avx2);
  assert(args.keys % 2 == 0 && args.columns % 16 == 0);
  for (int64_t j = 0; j < args.columns; j += 8) softmax8(args, j);
}

void rescale_add_avx2(const rescale_add_args& args) {
  record_run(operation::rescale_add, isa::avx2);
  assert(args.n % 16 == 0);
  for (int64_t i = 0; i < args.rows; ++i) {
    const __m256 factor = _mm256_set1_ps(args.factor[i]);
    const float* x = args.x + i * args.x_stride;
    float* acc = args.acc + i * args.acc_stride;
    for (int64_t j = 0; j < args.n; j += 8) {
      const __m256 kept = _mm256_mul_ps(_mm256_loadu_ps(acc + j), factor);
      _mm256_storeu_ps(acc + j, _mm256_add_ps(kept, _mm256_loadu_ps(x + j)));
    }
  }
}

void dequantise_rows_avx2(const dequantise_rows_args& args) {
  record_run(operation::dequantise_rows, isa::avx2);
  assert(args.group_size % 16 == 0);
  const int64_t whole = args.n / 16 * 16;
  const size_t rest = static_cast<size_t>(args.n - whole);
  const float* next_scale = args.scale;
  for (int64_t i = 0; i < args.rows; ++i) {
    const int8_t* q = args.q + i * args.n;
    uint16_t* out = args.out + i * args.out_stride;
    __m256 scale = _mm256_setzero_ps();
    for (int64_t begin = 0; begin < args.n; begin += args.group_size) {
      scale = _mm256_broadcast_ss(next_scale++);
      const int64_t group_end = begin + args.group_size;
      const int64_t end = group_end < whole ? group_end : whole;
      for (int64_t j = begin; j < end; j += 16) dequantise16(q + j, scale, out + j);
    }
    if (rest == 0) continue;
    int8_t q_tail[16] = {};
    uint16_t out_tail[16];
    memcpy(q_tail, q + whole, rest);
    dequantise16(q_tail, scale, out_tail);
    memcpy(out + whole, out_tail, rest * sizeof(uint16_t));
  }
}

void widen_rows_avx2(const widen_rows_args& args) {
  record_run(operation::widen_rows, isa::avx2);
  for (int64_t i = 0; i < args.rows; ++i) {
    const int8_t* q = args.q + i * args.n;
    uint16_t* out = args.out + i * args.out_stride;
    int64_t j = 0;
    for (; j + 16 <= args.n; j += 16) {
      const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(q + j));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + j), _mm256_cvtepi8_epi16(bytes));
    }
    for (; j < args.n; ++j) out[j] = static_cast<uint16_t>(int16_t{q[j]});
  }
}

// One panel after the other: the lines of a panel are written in order.
void pair_rows_avx2(const pair_rows_args& args) {
  record_run(operation::pair_rows, isa::avx2);
  assert(args.rows % 2 == 0 && args.n % 16 == 0);
  __m256i* line = reinterpret_cast<__m256i*>(args.packed);
  for (int64_t j = 0; j < args.n; j += 16) {
    const uint16_t* x = args.x + j;
    for (int64_t i = 0; i < args.rows; i += 2, line += 2, x += 2 * args.x_stride) {
      const __m256i even = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
      const __m256i odd = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + args.x_stride));
      const __m256i low = _mm256_unpacklo_epi16(even, odd);
      const __m256i high = _mm256_unpackhi_epi16(even, odd);
      _mm256_storeu_si256(line, _mm256_permute2x128_si256(low, high, 0x20));
      _mm256_storeu_si256(line + 1, _mm256_permute2x128_si256(low, high, 0x31));
    }
  }
}

void transpose_pairs_avx2(const transpose_pairs_args& args) {
  record_run(operation::transpose_pairs, isa::avx2);
  assert(args.rows % 8 == 0 && args.n % 8 == 0);
  for (int64_t i = 0; i < args.rows; i += 8) {
    for (int64_t j = 0; j < args.n; j += 8) transpose8(args, i, j);
  }
}

}  // namespace kt
