// int4_gemm in plain C++: the reference that the other files must equal bit for bit.
#include <bit>
#include <cassert>
#include <cmath>

#include "../isa.h"
#include "int4_gemm.h"

namespace kt {
namespace {

float bf16_scale(uint16_t bits) { return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16); }

// Sixteen outputs of one row in one group: one line of weights per eight k.
void dot_group(const int8_t* a, const uint8_t* line, int64_t group_size, int32_t* sums) {
  for (int j = 0; j < panel_outputs; ++j) sums[j] = 0;
  for (int64_t kk = 0; kk < group_size; kk += 8, line += 64) {
    for (int j = 0; j < panel_outputs; ++j) {
      for (int i = 0; i < 4; ++i) {
        const uint8_t both = line[4 * j + i];
        sums[j] += int32_t{a[kk + i]} * ((both & 15) - int4_zero);
        sums[j] += int32_t{a[kk + 4 + i]} * ((both >> 4) - int4_zero);
      }
    }
  }
}

}  // namespace

void int4_gemm_portable(const gemm_args& args) {
  record_run(operation::int4_gemm, isa::portable);
  assert(args.k > 0 && args.k % int4_gemm_k_multiple == 0 && args.k % args.group_size == 0);
  assert(args.n % gemm_n_multiple == 0);
  const int8_t* activations = static_cast<const int8_t*>(args.a);
  const int64_t groups = args.k / args.group_size;
  for (int64_t j = 0; j < args.n; j += panel_outputs) {
    const uint8_t* panel = static_cast<const uint8_t*>(args.packed) + j * args.k / 2;
    const uint16_t* scale = static_cast<const uint16_t*>(args.w_scale) + j * groups;
    for (int64_t i = 0; i < args.m; ++i) {
      const int64_t row = args.rows ? args.rows[i] : i;
      float total[panel_outputs] = {};
      for (int64_t g = 0; g < groups; ++g) {
        int32_t sums[panel_outputs];
        dot_group(activations + row * args.k + g * args.group_size,
                  panel + g * args.group_size * panel_outputs / 2, args.group_size, sums);
        for (int jj = 0; jj < panel_outputs; ++jj) {
          total[jj] = std::fma(static_cast<float>(sums[jj]),
                               bf16_scale(scale[g * panel_outputs + jj]), total[jj]);
        }
      }
      float* c = args.c + i * args.c_stride + j;
      for (int jj = 0; jj < panel_outputs; ++jj) c[jj] = args.a_scale[row] * total[jj];
    }
  }
}

}  // namespace kt
