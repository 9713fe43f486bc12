// router_logits for AVX2. Four experts at a time: the additions of one wait for each other.
#include <immintrin.h>

#include <cstring>

#include "../isa.h"
#include "../lanes256.h"
#include "router.h"

namespace kt {
namespace {

__m256 load8(const uint16_t* x) { return load_bf16(x); }
__m256 load8(const float* x) { return _mm256_loadu_ps(x); }

// The last values of a row, zeros behind them.
template <typename element>
__m256 load_some(const element* x, int64_t count) {
  element some[8] = {};
  memcpy(some, x, static_cast<size_t>(count) * sizeof(element));
  return load8(some);
}

template <int count, typename element>
void dot(int64_t n, const element* x, const element* weight, float* logits) {
  __m256 lanes[count];
  for (int e = 0; e < count; ++e) lanes[e] = _mm256_setzero_ps();
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m256 v = load8(x + i);
#pragma GCC unroll 4
    for (int e = 0; e < count; ++e) {
      lanes[e] = _mm256_add_ps(lanes[e], _mm256_mul_ps(v, load8(weight + e * n + i)));
    }
  }
  if (i < n) {
    const __m256 v = load_some(x + i, n - i);
    for (int e = 0; e < count; ++e) {
      const __m256 w = load_some(weight + e * n + i, n - i);
      lanes[e] = _mm256_add_ps(lanes[e], _mm256_mul_ps(v, w));
    }
  }
  for (int e = 0; e < count; ++e) logits[e] = sum_of_lanes(lanes[e]);
}

template <typename element>
void all_rows(const router_logits_args& args) {
  const element* weight = static_cast<const element*>(args.weight);
  for (int64_t row = 0; row < args.rows; ++row) {
    const element* x = static_cast<const element*>(args.x) + row * args.n;
    float* logits = args.logits + row * args.logits_stride;
    int64_t e = 0;
    for (; e + 4 <= args.experts; e += 4) dot<4>(args.n, x, weight + e * args.n, logits + e);
    for (; e < args.experts; ++e) dot<1>(args.n, x, weight + e * args.n, logits + e);
  }
}

}  // namespace

void router_logits_avx2(const router_logits_args& args) {
  record_run(operation::router_logits, isa::avx2);
  args.type == float_type::bf16 ? all_rows<uint16_t>(args) : all_rows<float>(args);
}

}  // namespace kt
