// bf16_peak for AMX: tdpbf16ps on tiles.
#include "../bf16_gemm/amx_tile.h"
#include "../isa.h"
#include "peak.h"

namespace kt {

peak_result bf16_peak_amx_bf16(int64_t iterations) {
  record_run(operation::bf16_peak, isa::amx_bf16);
  return tile_peak<bf16_tile>(iterations, "tdpbf16ps");
}

}  // namespace kt
