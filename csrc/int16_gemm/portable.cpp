// int16_gemm in plain C++: the reference that the other files must equal bit for bit.
#include <cassert>

#include "../isa.h"
#include "int16_gemm.h"

namespace kt {
namespace {

int32_t value(uint16_t word) { return static_cast<int16_t>(word); }

}  // namespace

void int16_gemm_portable(const int16_gemm_args& args) {
  record_run(operation::int16_gemm, isa::portable);
  assert(args.n % panel_outputs == 0 && args.k % 2 == 0);
  assert(args.k > 0 && args.k <= int16_gemm_max_k);
  for (int64_t i = 0; i < args.m; ++i) {
    const uint16_t* a = args.a + i * args.a_stride;
    for (int64_t j = 0; j < args.n; ++j) {
      const uint16_t* w =
          args.packed + j / panel_outputs * panel_outputs * args.k + j % panel_outputs * 2;
      int32_t sum = 0;
      for (int64_t k = 0; k < args.k; ++k) {
        sum += value(a[k]) * value(w[k / 2 * 2 * panel_outputs + k % 2]);
      }
      float* c = args.c + i * args.c_stride + j;
      *c = *c * args.c_scale[i] + static_cast<float>(sum) * (args.a_scale[i] * args.w_scale[j]);
    }
  }
}

}  // namespace kt
