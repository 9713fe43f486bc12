// int8_gemm for AMX.
#include <cassert>

#include "../isa.h"
#include "amx_tile.h"
#include "int8_gemm.h"

namespace kt {

void int8_gemm_amx_int8(const gemm_args& args) {
  record_run(operation::int8_gemm, isa::amx_int8);
  assert(args.k > 0 && args.k % int8_gemm_k_multiple == 0);
  assert(args.n % gemm_n_multiple == 0);
  tile_gemm<int8_tile>(args);
}

}  // namespace kt
