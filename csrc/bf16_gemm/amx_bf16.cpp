// bf16_gemm for AMX.
#include <cassert>

#include "../isa.h"
#include "amx_tile.h"
#include "bf16_gemm.h"

namespace kt {

void bf16_gemm_amx_bf16(const gemm_args& args) {
  record_run(operation::bf16_gemm, isa::amx_bf16);
  assert(args.k > 0 && args.k % bf16_gemm_k_multiple == 0);
  assert(args.n % bf16_gemm_n_multiple == 0);
  tile_gemm<bf16_tile>(args);
}

}  // namespace kt
