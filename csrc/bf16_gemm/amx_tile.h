// bf16 in AMX tiles: tdpbf16ps multiplies 16 rows x 32 k of activations with 32 k x 16 outputs,
// which is 16 lines of the packed layout as they lie.
#pragma once

#include "../amx_tiles.h"

namespace kt {
namespace {

struct bf16_tile {
  using element = uint16_t;
  static constexpr int64_t tile_k = 32;

  template <int c>
  static void multiply() {
    if constexpr (c == 0) _tile_dpbf16ps(0, 4, 6);
    if constexpr (c == 1) _tile_dpbf16ps(1, 4, 7);
    if constexpr (c == 2) _tile_dpbf16ps(2, 5, 6);
    if constexpr (c == 3) _tile_dpbf16ps(3, 5, 7);
  }

  template <int c>
  static void store(const gemm_args& args, int64_t i, int64_t, int64_t j) {
    store_tile<c>(args.c + i * args.c_stride + j, args.c_stride * int64_t{sizeof(float)});
  }
};

}  // namespace
}  // namespace kt
