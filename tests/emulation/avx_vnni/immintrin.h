// The compiler's own intrinsics, with those of AVX-VNNI that avx_vnni.cpp files use replaced by
// plain C++: they are then tested on machines with AVX2 alone. See ../immintrin.h.
#pragma once

#include_next <immintrin.h>
#include <stdint.h>

typedef int32_t kt_i32x8 __attribute__((vector_size(32)));
typedef uint32_t kt_u32x8 __attribute__((vector_size(32)));

// VPDPBUSD: unsigned bytes of `u` times signed bytes of `s`, four products added to each lane of
// `sums` without saturation.
static inline __attribute__((always_inline, unused)) __m256i kt_dpbusd(__m256i sums, __m256i u,
                                                                       __m256i s) {
  kt_u32x8 total = (kt_u32x8)sums;
  for (int shift = 0; shift < 32; shift += 8) {
    const kt_i32x8 unsigned_bytes = (kt_i32x8)(((kt_u32x8)u >> shift) & 0xff);
    const kt_i32x8 signed_bytes = (kt_i32x8)((kt_u32x8)s << (24 - shift)) >> 24;
    total += (kt_u32x8)(unsigned_bytes * signed_bytes);
  }
  return (__m256i)total;
}
#define _mm256_dpbusd_avx_epi32 kt_dpbusd

// VPDPWSSD: two products of signed words added to each lane of `sums` without saturation.
static inline __attribute__((always_inline, unused)) __m256i kt_dpwssd(__m256i sums, __m256i a,
                                                                       __m256i b) {
  kt_u32x8 total = (kt_u32x8)sums;
  for (int shift = 0; shift < 32; shift += 16) {
    const kt_i32x8 words_a = (kt_i32x8)((kt_u32x8)a << (16 - shift)) >> 16;
    const kt_i32x8 words_b = (kt_i32x8)((kt_u32x8)b << (16 - shift)) >> 16;
    total += (kt_u32x8)(words_a * words_b);
  }
  return (__m256i)total;
}
#define _mm256_dpwssd_avx_epi32 kt_dpwssd
