// int16_gemm for AVX2: vpmaddwd adds two products of int16 in each lane.
#include <immintrin.h>

#include <cassert>

#include "../isa.h"
#include "tile256.h"

namespace kt {
namespace {

accumulators dot2(accumulators sums, __m256i w, __m256i a) {
  return sums + reinterpret_cast<accumulators>(_mm256_madd_epi16(w, a));
}

}  // namespace

void int16_gemm_avx2(const int16_gemm_args& args) {
  record_run(operation::int16_gemm, isa::avx2);
  assert(args.n % panel_outputs == 0 && args.k % 2 == 0);
  assert(args.k > 0 && args.k <= int16_gemm_max_k);
  by_panel(args, tiles<dot2>);
}

}  // namespace kt
