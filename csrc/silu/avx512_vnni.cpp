// silu_mul for AVX-512. No FMA, so that the bits are the portable ones.
#include <immintrin.h>

#include <cassert>

#include "../isa.h"
#include "silu.h"

namespace kt {
namespace {

__m512 multiply_add(__m512 a, __m512 b, float c) {
  return _mm512_add_ps(_mm512_mul_ps(a, b), _mm512_set1_ps(c));
}

__m512 silu(__m512 g) {
  const __m512i sign = _mm512_set1_epi32(static_cast<int32_t>(0x80000000u));
  __m512 z = _mm512_castsi512_ps(_mm512_xor_si512(_mm512_castps_si512(g), sign));
  z = _mm512_max_ps(_mm512_set1_ps(silu_low), z);  // both return z where z is NaN
  z = _mm512_min_ps(_mm512_set1_ps(silu_high), z);
  const __m512 round = _mm512_set1_ps(silu_round);
  const __m512 t = multiply_add(z, _mm512_set1_ps(silu_log2e), silu_round);
  const __m512 n = _mm512_sub_ps(t, round);
  __m512 r = _mm512_sub_ps(z, _mm512_mul_ps(n, _mm512_set1_ps(silu_ln2_high)));
  r = _mm512_sub_ps(r, _mm512_mul_ps(n, _mm512_set1_ps(silu_ln2_low)));
  __m512 p = _mm512_set1_ps(silu_c0);
  p = multiply_add(p, r, silu_c1);
  p = multiply_add(p, r, silu_c2);
  p = multiply_add(p, r, silu_c3);
  p = multiply_add(p, r, silu_c4);
  p = multiply_add(p, r, silu_c5);
  const __m512i integer = _mm512_sub_epi32(_mm512_castps_si512(t), _mm512_castps_si512(round));
  const __m512 power =
      _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(integer, _mm512_set1_epi32(127)), 23));
  const __m512 one = _mm512_set1_ps(1.0f);
  __m512 e = _mm512_add_ps(_mm512_mul_ps(p, _mm512_mul_ps(r, r)), r);
  e = _mm512_mul_ps(_mm512_add_ps(e, one), power);
  return _mm512_div_ps(g, _mm512_add_ps(one, e));
}

}  // namespace

void silu_mul_avx512_vnni(const silu_mul_args& args) {
  record_run(operation::silu_mul, isa::avx512_vnni);
  assert(args.n % 16 == 0);
  for (int64_t row = 0; row < args.rows; ++row) {
    const float* gate = args.gate + row * args.tile_stride;
    const float* up = args.up + row * args.tile_stride;
    float* out = args.out + row * args.out_stride;
    for (int64_t j = 0; j < args.n; j += 16) {
      const __m512 h = _mm512_mul_ps(silu(_mm512_loadu_ps(gate + j)), _mm512_loadu_ps(up + j));
      _mm512_storeu_ps(out + j, h);
    }
  }
}

}  // namespace kt
