// int8_peak and int4_peak for AMX: tdpbssd on tiles.
#include "../int8_gemm/amx_tile.h"
#include "../isa.h"
#include "peak.h"

namespace kt {

peak_result int8_peak_amx_int8(int64_t iterations) {
  record_run(operation::int8_peak, isa::amx_int8);
  return tile_peak<int8_tile>(iterations, "tdpbssd");
}

peak_result int4_peak_amx_int8(int64_t iterations) {
  record_run(operation::int4_peak, isa::amx_int8);
  return int8_peak_amx_int8(iterations);
}

}  // namespace kt
