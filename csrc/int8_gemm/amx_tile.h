// int8 in AMX tiles: tdpbssd multiplies 16 rows x 64 k of activations with 64 k x 16 outputs, which
// is 16 lines of the packed layout as they lie, both signed.
#pragma once

#include "../amx_tiles.h"
#include "../lanes256.h"

namespace kt {
namespace {

struct int8_tile {
  using element = int8_t;
  static constexpr int64_t tile_k = 64;

  template <int c>
  static void multiply() {
    if constexpr (c == 0) _tile_dpbssd(0, 4, 6);
    if constexpr (c == 1) _tile_dpbssd(1, 4, 7);
    if constexpr (c == 2) _tile_dpbssd(2, 5, 6);
    if constexpr (c == 3) _tile_dpbssd(3, 5, 7);
  }

  template <int c>
  static void store(const gemm_args& args, int64_t i, int64_t rows, int64_t j) {
    alignas(64) int32_t sums[amx_rows * panel_outputs];
    store_tile<c>(sums, 64);
    const float* w_scale = static_cast<const float*>(args.w_scale) + j;
    for (int64_t r = 0; r < rows; ++r) {
      const float a_scale = args.a_scale[args.rows ? args.rows[i + r] : i + r];
      float* to = args.c + (i + r) * args.c_stride + j;
      for (int64_t half = 0; half < panel_outputs; half += 8) {
        const __m256i at = load(sums + r * panel_outputs + half);
        store_scaled(to + half, reinterpret_cast<accumulators>(at), a_scale, w_scale + half);
      }
    }
  }
};

}  // namespace
}  // namespace kt
