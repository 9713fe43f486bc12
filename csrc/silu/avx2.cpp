// silu_mul for AVX2. No FMA, so that the bits are the portable ones.
#include <immintrin.h>

#include <cassert>

#include "../isa.h"
#include "silu.h"

namespace kt {
namespace {

__m256 multiply_add(__m256 a, __m256 b, float c) {
  return _mm256_add_ps(_mm256_mul_ps(a, b), _mm256_set1_ps(c));
}

__m256 silu(__m256 g) {
  __m256 z = _mm256_xor_ps(g, _mm256_set1_ps(-0.0f));
  z = _mm256_max_ps(_mm256_set1_ps(silu_low), z);  // both return z where z is NaN
  z = _mm256_min_ps(_mm256_set1_ps(silu_high), z);
  const __m256 round = _mm256_set1_ps(silu_round);
  const __m256 t = multiply_add(z, _mm256_set1_ps(silu_log2e), silu_round);
  const __m256 n = _mm256_sub_ps(t, round);
  __m256 r = _mm256_sub_ps(z, _mm256_mul_ps(n, _mm256_set1_ps(silu_ln2_high)));
  r = _mm256_sub_ps(r, _mm256_mul_ps(n, _mm256_set1_ps(silu_ln2_low)));
  __m256 p = _mm256_set1_ps(silu_c0);
  p = multiply_add(p, r, silu_c1);
  p = multiply_add(p, r, silu_c2);
  p = multiply_add(p, r, silu_c3);
  p = multiply_add(p, r, silu_c4);
  p = multiply_add(p, r, silu_c5);
  const __m256i integer = _mm256_sub_epi32(_mm256_castps_si256(t), _mm256_castps_si256(round));
  const __m256 power =
      _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(integer, _mm256_set1_epi32(127)), 23));
  const __m256 one = _mm256_set1_ps(1.0f);
  __m256 e = _mm256_add_ps(_mm256_mul_ps(p, _mm256_mul_ps(r, r)), r);
  e = _mm256_mul_ps(_mm256_add_ps(e, one), power);
  return _mm256_div_ps(g, _mm256_add_ps(one, e));
}

}  // namespace

void silu_mul_avx2(const silu_mul_args& args) {
  record_run(operation::silu_mul, isa::avx2);
  assert(args.n % 16 == 0);
  for (int64_t row = 0; row < args.rows; ++row) {
    const float* gate = args.gate + row * args.tile_stride;
    const float* up = args.up + row * args.tile_stride;
    float* out = args.out + row * args.out_stride;
    for (int64_t j = 0; j < args.n; j += 8) {
      const __m256 h = _mm256_mul_ps(silu(_mm256_loadu_ps(gate + j)), _mm256_loadu_ps(up + j));
      _mm256_storeu_ps(out + j, h);
    }
  }
}

}  // namespace kt
