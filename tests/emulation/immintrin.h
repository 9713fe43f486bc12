// AVX-512 intrinsics in plain C++, exactly those that the shipped avx512_*.cpp files use.
//
// A test build puts this folder first on the include path and compiles the shipped sources
// unmodified, so that they are tested on machines without AVX-512. Semantics: Intel 64 and IA-32
// Software Developer's Manual, vol. 2. Floating-point operations are those of the scalar type, one
// rounding each, in the default rounding mode.
#pragma once

#include <stdint.h>
#include <string.h>

typedef uint16_t __mmask16;
typedef struct {
  int32_t i[4];
} __m128i;
typedef struct {
  int32_t i[8];
} __m256i;
typedef int32_t __m512i __attribute__((vector_size(64)));
typedef float __m512 __attribute__((vector_size(64)));
typedef int16_t __m512bh __attribute__((vector_size(64)));
typedef uint32_t kt_u32x16 __attribute__((vector_size(64)));

#define KT_INTRINSIC static inline __attribute__((always_inline, unused))
// The one predicate in use has a type of its own: any other is a compile error.
struct kt_unordered {};
#define _CMP_UNORD_Q \
  kt_unordered {}

// Loads, stores, constants, casts.

KT_INTRINSIC __m512i _mm512_loadu_si512(const void* p) {
  __m512i v;
  memcpy(&v, p, sizeof(v));
  return v;
}
KT_INTRINSIC __m512 _mm512_loadu_ps(const void* p) {
  __m512 v;
  memcpy(&v, p, sizeof(v));
  return v;
}
KT_INTRINSIC void _mm512_storeu_ps(void* p, __m512 v) { memcpy(p, &v, sizeof(v)); }
KT_INTRINSIC void _mm512_storeu_si512(void* p, __m512i v) { memcpy(p, &v, sizeof(v)); }
KT_INTRINSIC void _mm_storeu_si128(__m128i* p, __m128i v) { memcpy(p, &v, sizeof(v)); }
KT_INTRINSIC __m512 _mm512_maskz_loadu_ps(__mmask16 mask, const void* p) {
  __m512 v = {};
  for (int i = 0; i < 16; ++i) {
    float one;
    if (mask >> i & 1) memcpy(&one, (const char*)p + 4 * i, 4), v[i] = one;
  }
  return v;
}
KT_INTRINSIC __m512i _mm512_maskz_loadu_epi32(__mmask16 mask, const void* p) {
  __m512i v = {};
  for (int i = 0; i < 16; ++i) {
    int32_t one;
    if (mask >> i & 1) memcpy(&one, (const char*)p + 4 * i, 4), v[i] = one;
  }
  return v;
}
KT_INTRINSIC __m256i _mm256_maskz_loadu_epi16(__mmask16 mask, const void* p) {
  uint16_t lanes[16] = {};
  for (int i = 0; i < 16; ++i) {
    if (mask >> i & 1) memcpy(lanes + i, (const char*)p + 2 * i, 2);
  }
  __m256i v;
  memcpy(&v, lanes, sizeof(v));
  return v;
}
KT_INTRINSIC void _mm512_mask_storeu_ps(void* p, __mmask16 mask, __m512 v) {
  for (int i = 0; i < 16; ++i) {
    const float one = v[i];
    if (mask >> i & 1) memcpy((char*)p + 4 * i, &one, 4);
  }
}
KT_INTRINSIC void _mm256_mask_storeu_epi16(void* p, __mmask16 mask, __m256i v) {
  uint16_t lanes[16];
  memcpy(lanes, &v, sizeof(v));
  for (int i = 0; i < 16; ++i) {
    if (mask >> i & 1) memcpy((char*)p + 2 * i, lanes + i, 2);
  }
}
KT_INTRINSIC __m512i _mm512_setzero_si512() { return __m512i{}; }
KT_INTRINSIC __m512i _mm512_set1_epi32(int32_t x) { return __m512i{} + x; }
KT_INTRINSIC __m512i _mm512_set1_epi8(char x) {
  return (__m512i)(kt_u32x16{} + 0x01010101u * (uint8_t)x);
}
KT_INTRINSIC __m512 _mm512_set1_ps(float x) {
  return __m512{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x};
}
KT_INTRINSIC __m512i _mm512_castps_si512(__m512 v) { return (__m512i)v; }
KT_INTRINSIC __m512 _mm512_castsi512_ps(__m512i v) { return (__m512)v; }

// Integers; additions wrap.

KT_INTRINSIC __m512i _mm512_add_epi32(__m512i a, __m512i b) {
  return (__m512i)((kt_u32x16)a + (kt_u32x16)b);
}
KT_INTRINSIC __m512i _mm512_sub_epi32(__m512i a, __m512i b) {
  return (__m512i)((kt_u32x16)a - (kt_u32x16)b);
}
KT_INTRINSIC __m512i _mm512_and_si512(__m512i a, __m512i b) { return a & b; }
KT_INTRINSIC __m512i _mm512_or_si512(__m512i a, __m512i b) { return a | b; }
KT_INTRINSIC __m512i _mm512_xor_si512(__m512i a, __m512i b) { return a ^ b; }
KT_INTRINSIC __m512i _mm512_slli_epi32(__m512i a, unsigned count) {
  return (__m512i)((kt_u32x16)a << count);
}
KT_INTRINSIC __m512i _mm512_srli_epi32(__m512i a, unsigned count) {
  return (__m512i)((kt_u32x16)a >> count);
}
KT_INTRINSIC __m512i _mm512_max_epi32(__m512i a, __m512i b) { return a > b ? a : b; }
KT_INTRINSIC int32_t _mm512_reduce_max_epi32(__m512i v) {
  int32_t max = v[0];
  for (int i = 1; i < 16; ++i) max = v[i] > max ? v[i] : max;
  return max;
}
KT_INTRINSIC int32_t _mm512_reduce_add_epi32(__m512i v) {
  uint32_t sum = 0;
  for (int i = 0; i < 16; ++i) sum += (uint32_t)v[i];
  return (int32_t)sum;
}

// VPDPBUSD: unsigned bytes of `u` times signed bytes of `s`, four products added to each lane of
// `sums` without saturation.
KT_INTRINSIC __m512i _mm512_dpbusd_epi32(__m512i sums, __m512i u, __m512i s) {
  kt_u32x16 total = (kt_u32x16)sums;
  for (int shift = 0; shift < 32; shift += 8) {
    const __m512i unsigned_bytes = (u >> shift) & 0xff;
    const __m512i signed_bytes = (__m512i)((kt_u32x16)s << (24 - shift)) >> 24;
    total += (kt_u32x16)(unsigned_bytes * signed_bytes);
  }
  return (__m512i)total;
}

// VPDPWSSD: two products of signed words added to each lane of `sums` without saturation.
KT_INTRINSIC __m512i _mm512_dpwssd_epi32(__m512i sums, __m512i a, __m512i b) {
  kt_u32x16 total = (kt_u32x16)sums;
  for (int shift = 0; shift < 32; shift += 16) {
    const __m512i words_a = (__m512i)((kt_u32x16)a << (16 - shift)) >> 16;
    const __m512i words_b = (__m512i)((kt_u32x16)b << (16 - shift)) >> 16;
    total += (kt_u32x16)(words_a * words_b);
  }
  return (__m512i)total;
}

// Conversions.

KT_INTRINSIC __m512i _mm512_cvtepu16_epi32(__m256i v) {
  uint16_t lanes[16];
  memcpy(lanes, &v, sizeof(v));
  __m512i wide;
  for (int i = 0; i < 16; ++i) wide[i] = lanes[i];
  return wide;
}
KT_INTRINSIC __m128i _mm512_cvtepi32_epi8(__m512i v) {
  int8_t lanes[16];
  for (int i = 0; i < 16; ++i) lanes[i] = (int8_t)v[i];
  __m128i narrow;
  memcpy(&narrow, lanes, sizeof(narrow));
  return narrow;
}
KT_INTRINSIC __m256i _mm512_cvtepi32_epi16(__m512i v) {
  uint16_t lanes[16];
  for (int i = 0; i < 16; ++i) lanes[i] = (uint16_t)v[i];
  __m256i narrow;
  memcpy(&narrow, lanes, sizeof(narrow));
  return narrow;
}
KT_INTRINSIC __m512 _mm512_cvtepi32_ps(__m512i v) { return __builtin_convertvector(v, __m512); }
// Rounds to nearest even; NaN and what does not fit give 0x80000000, as VCVTPS2DQ does.
KT_INTRINSIC __m512i _mm512_cvtps_epi32(__m512 v) {
  __m512i integers;
  for (int i = 0; i < 16; ++i) {
    const bool fits = v[i] >= -2147483648.0f && v[i] < 2147483648.0f;
    integers[i] = fits ? (int32_t)__builtin_rintf(v[i]) : INT32_MIN;
  }
  return integers;
}
KT_INTRINSIC __m512 _mm512_cvtph_ps(__m256i v) {
  uint16_t lanes[16];
  memcpy(lanes, &v, sizeof(v));
  __m512 wide;
  for (int i = 0; i < 16; ++i) {
    const int exponent = lanes[i] >> 10 & 31;
    const int fraction = lanes[i] & 1023;
    float value;
    if (exponent == 31) {
      value = fraction ? __builtin_nanf("") : __builtin_inff();
    } else if (exponent == 0) {
      value = (float)fraction * 0x1p-24f;
    } else {
      const uint32_t bits = (uint32_t)(exponent + 112) << 23 | (uint32_t)fraction << 13;
      memcpy(&value, &bits, sizeof(value));
    }
    wide[i] = lanes[i] & 0x8000 ? -value : value;
  }
  return wide;
}

// Floating point. MIN and MAX give the second operand where either is NaN.

KT_INTRINSIC __m512 _mm512_add_ps(__m512 a, __m512 b) { return a + b; }
KT_INTRINSIC __m512 _mm512_sub_ps(__m512 a, __m512 b) { return a - b; }
KT_INTRINSIC __m512 _mm512_mul_ps(__m512 a, __m512 b) { return a * b; }
KT_INTRINSIC __m512 _mm512_div_ps(__m512 a, __m512 b) { return a / b; }
KT_INTRINSIC __m512 _mm512_max_ps(__m512 a, __m512 b) { return a > b ? a : b; }
KT_INTRINSIC __m512 _mm512_min_ps(__m512 a, __m512 b) { return a < b ? a : b; }

KT_INTRINSIC __m512 _mm512_fmadd_ps(__m512 a, __m512 b, __m512 c) {
  for (int i = 0; i < 16; ++i) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return c;
}

// VDPBF16PS: the odd product is added first. The instruction also flushes subnormals, this does
// not.
KT_INTRINSIC __m512 _mm512_dpbf16_ps(__m512 sums, __m512bh a, __m512bh b) {
  const kt_u32x16 pairs_a = (kt_u32x16)a, pairs_b = (kt_u32x16)b;
  const __m512 odd_a = (__m512)(pairs_a & 0xffff0000u), odd_b = (__m512)(pairs_b & 0xffff0000u);
  sums = _mm512_fmadd_ps(odd_a, odd_b, sums);
  return _mm512_fmadd_ps((__m512)(pairs_a << 16), (__m512)(pairs_b << 16), sums);
}

// Masks.

KT_INTRINSIC __mmask16 _mm512_cmp_ps_mask(__m512 a, __m512 b, kt_unordered) {
  __mmask16 mask = 0;
  for (int i = 0; i < 16; ++i) {
    if (__builtin_isunordered(a[i], b[i])) mask = (__mmask16)(mask | 1u << i);
  }
  return mask;
}
KT_INTRINSIC __mmask16 _mm512_cmpgt_epi32_mask(__m512i a, __m512i b) {
  __mmask16 mask = 0;
  for (int i = 0; i < 16; ++i) {
    if (a[i] > b[i]) mask = (__mmask16)(mask | 1u << i);
  }
  return mask;
}
KT_INTRINSIC __m512i _mm512_mask_blend_epi32(__mmask16 mask, __m512i a, __m512i b) {
  for (int i = 0; i < 16; ++i) a[i] = mask >> i & 1 ? b[i] : a[i];
  return a;
}
KT_INTRINSIC __m512 _mm512_mask_blend_ps(__mmask16 mask, __m512 a, __m512 b) {
  for (int i = 0; i < 16; ++i) a[i] = mask >> i & 1 ? b[i] : a[i];
  return a;
}
