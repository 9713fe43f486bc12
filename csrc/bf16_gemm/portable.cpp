// bf16_gemm in plain C++: fp32 products and sums, k ascending.
#include <bit>
#include <cassert>

#include "../isa.h"
#include "bf16_gemm.h"

namespace kt {
namespace {

float to_float(uint16_t bits) { return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16); }

}  // namespace

void bf16_gemm_portable(const gemm_args& args) {
  record_run(operation::bf16_gemm, isa::portable);
  assert(args.k > 0 && args.k % bf16_gemm_k_multiple == 0);
  assert(args.n % bf16_gemm_n_multiple == 0);
  for (int64_t j = 0; j < args.n; j += panel_outputs) {
    const uint16_t* panel = static_cast<const uint16_t*>(args.packed) + j * args.k;
    for (int64_t i = 0; i < args.m; ++i) {
      const int64_t row = args.rows ? args.rows[i] : i;
      const uint16_t* a = static_cast<const uint16_t*>(args.a) + row * args.k;
      float sums[panel_outputs] = {};
      for (int64_t kk = 0; kk < args.k; ++kk) {
        const uint16_t* line = panel + kk / 2 * 2 * panel_outputs + kk % 2;
        for (int jj = 0; jj < panel_outputs; ++jj) {
          sums[jj] += to_float(a[kk]) * to_float(line[2 * jj]);
        }
      }
      for (int jj = 0; jj < panel_outputs; ++jj) args.c[i * args.c_stride + j + jj] = sums[jj];
    }
  }
}

}  // namespace kt
