// int8_gemm in plain C++: the reference that the other files must equal bit for bit.
#include <cassert>

#include "../isa.h"
#include "int8_gemm.h"

namespace kt {
namespace {

// Sixteen outputs of one row: one line of weights per four k.
void dot_line(const int8_t* a, const int8_t* packed, int64_t k, int32_t* sums) {
  for (int j = 0; j < panel_outputs; ++j) sums[j] = 0;
  for (int64_t kk = 0; kk < k; kk += 4) {
    const int8_t* line = packed + kk * panel_outputs;
    for (int j = 0; j < panel_outputs; ++j) {
      for (int i = 0; i < 4; ++i) sums[j] += int32_t{a[kk + i]} * int32_t{line[4 * j + i]};
    }
  }
}

}  // namespace

void int8_gemm_portable(const gemm_args& args) {
  record_run(operation::int8_gemm, isa::portable);
  assert(args.k > 0 && args.k % int8_gemm_k_multiple == 0);
  assert(args.n % gemm_n_multiple == 0);
  const float* w_scale = static_cast<const float*>(args.w_scale);
  for (int64_t j = 0; j < args.n; j += panel_outputs) {
    const int8_t* panel = static_cast<const int8_t*>(args.packed) + j * args.k;
    for (int64_t i = 0; i < args.m; ++i) {
      const int64_t row = args.rows ? args.rows[i] : i;
      int32_t sums[panel_outputs];
      dot_line(static_cast<const int8_t*>(args.a) + row * args.k, panel, args.k, sums);
      for (int jj = 0; jj < panel_outputs; ++jj) {
        const float scale = args.a_scale[row] * w_scale[j + jj];
        args.c[i * args.c_stride + j + jj] = static_cast<float>(sums[jj]) * scale;
      }
    }
  }
}

}  // namespace kt
