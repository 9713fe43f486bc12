// rms_norm and add_rows for AVX2.
#include <immintrin.h>

#include <cstring>

#include "../isa.h"
#include "../lanes256.h"
#include "norm.h"

namespace kt {
namespace {

struct bf16_values {
  using element = uint16_t;
  static __m256 load8(const uint16_t* x) { return load_bf16(x); }
  static void store8(uint16_t* out, __m256 y) { store_bf16(out, y); }
  static __m256 rounded(__m256 y) { return rounded_to_bf16(y); }
};

struct fp32_values {
  using element = float;
  static __m256 load8(const float* x) { return _mm256_loadu_ps(x); }
  static void store8(float* out, __m256 y) { _mm256_storeu_ps(out, y); }
  static __m256 rounded(__m256 y) { return y; }
};

// The last values of a row, zeros behind them.
template <typename values>
__m256 load_some(const typename values::element* x, int64_t count) {
  typename values::element some[8] = {};
  memcpy(some, x, static_cast<size_t>(count) * sizeof(some[0]));
  return values::load8(some);
}

template <typename values>
void store_some(typename values::element* out, __m256 y, int64_t count) {
  typename values::element some[8];
  values::store8(some, y);
  memcpy(out, some, static_cast<size_t>(count) * sizeof(some[0]));
}

template <typename values>
void norm_rows(const rms_norm_args& args) {
  using element = typename values::element;
  const element* weight = static_cast<const element*>(args.weight);
  const int64_t n = args.n, whole = n / 8 * 8;
  for (int64_t row = 0; row < args.rows; ++row) {
    const element* x = static_cast<const element*>(args.x) + row * args.x_stride;
    element* out = static_cast<element*>(args.out) + row * n;
    __m256 lanes = _mm256_setzero_ps();
    for (int64_t i = 0; i < whole; i += 8) {
      const __m256 v = values::load8(x + i);
      lanes = _mm256_add_ps(lanes, _mm256_mul_ps(v, v));
    }
    if (whole < n) {
      const __m256 v = load_some<values>(x + whole, n - whole);
      lanes = _mm256_add_ps(lanes, _mm256_mul_ps(v, v));
    }
    const float mean = sum_of_lanes(lanes) / static_cast<float>(n);
    const __m128 root = _mm_sqrt_ss(_mm_set_ss(mean + args.eps));
    const __m256 r = _mm256_set1_ps(1.0f / _mm_cvtss_f32(root));
    for (int64_t i = 0; i < whole; i += 8) {
      const __m256 v = values::rounded(_mm256_mul_ps(values::load8(x + i), r));
      values::store8(out + i, _mm256_mul_ps(values::load8(weight + i), v));
    }
    if (whole < n) {
      const int64_t rest = n - whole;
      const __m256 v = values::rounded(_mm256_mul_ps(load_some<values>(x + whole, rest), r));
      store_some<values>(out + whole, _mm256_mul_ps(load_some<values>(weight + whole, rest), v),
                         rest);
    }
  }
}

template <typename values>
void add_all(const add_rows_args& args) {
  using element = typename values::element;
  const element* a = static_cast<const element*>(args.a);
  const element* b = static_cast<const element*>(args.b);
  element* out = static_cast<element*>(args.out);
  const int64_t whole = args.count / 8 * 8, rest = args.count - whole;
  for (int64_t i = 0; i < whole; i += 8) {
    values::store8(out + i, _mm256_add_ps(values::load8(a + i), values::load8(b + i)));
  }
  if (rest == 0) return;
  const __m256 sum =
      _mm256_add_ps(load_some<values>(a + whole, rest), load_some<values>(b + whole, rest));
  store_some<values>(out + whole, sum, rest);
}

}  // namespace

void rms_norm_avx2(const rms_norm_args& args) {
  record_run(operation::rms_norm, isa::avx2);
  args.type == float_type::bf16 ? norm_rows<bf16_values>(args) : norm_rows<fp32_values>(args);
}

void add_rows_avx2(const add_rows_args& args) {
  record_run(operation::add_rows, isa::avx2);
  args.type == float_type::bf16 ? add_all<bf16_values>(args) : add_all<fp32_values>(args);
}

}  // namespace kt
