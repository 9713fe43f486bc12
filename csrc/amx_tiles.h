// What AMX kernels share: a matrix product in tiles of 16 rows and one panel of outputs; see
// row_groups.h for the anonymous namespace. Nothing but AVX2 beside the tiles, so that tests can
// run the machine code where only the tile instructions have to be emulated.
//
// Tiles 0 to 3 are sums (two of rows by two of outputs), 4 and 5 rows of activations, 6 and 7
// panels of weights. GCC's intrinsics paste their arguments: tile numbers are literals everywhere.
//
// A format is a type with: `element`; `tile_k`, the inputs of a tile; `multiply<c>()`, which adds
// the product of its two sources to tile c; `store<c>(args, i, rows, j)`, which takes the finished
// sums of `rows` rows from row index i on and of the panel of output j out of tile c.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "bench/peak.h"
#include "gemm.h"

namespace kt {
namespace {

constexpr int64_t amx_rows = 16;
// Rows that an index picks are copied, so many inputs ahead that tiles are loaded from the cache
// and not from the store buffer, which cannot forward two stores to one load.
constexpr int64_t gathered_tiles = 8;

// The memory operand of ldtilecfg (Intel SDM vol. 1, 18.2): palette 1, sizes of eight tiles.
struct alignas(64) tile_config {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// GCC's tile intrinsics do not tell the compiler that they read memory: stores stay above this.
void keep_stores() { __asm__ volatile("" ::: "memory"); }

// For `rows` rows of activations, 1 to 32; where they are 16 or fewer, tiles 2, 3 and 5 are absent.
void configure_tiles(int64_t rows) {
  const uint8_t first = static_cast<uint8_t>(rows < amx_rows ? rows : amx_rows);
  const uint8_t second = static_cast<uint8_t>(rows - first);
  const uint8_t sizes[8] = {first, first, second, second, first, second, 16, 16};
  tile_config config;
  for (int tile = 0; tile < 8; ++tile) {
    config.rows[tile] = sizes[tile];
    config.row_bytes[tile] = sizes[tile] ? 64 : 0;
  }
  keep_stores();
  _tile_loadconfig(&config);
}

template <int c>
void store_tile(void* to, int64_t stride) {
  if constexpr (c == 0) _tile_stored(0, to, stride);
  if constexpr (c == 1) _tile_stored(1, to, stride);
  if constexpr (c == 2) _tile_stored(2, to, stride);
  if constexpr (c == 3) _tile_stored(3, to, stride);
  keep_stores();
}

// Two tiles of activations, with `stride` bytes from row to row.
template <typename element>
struct tile_rows {
  const element* first;
  const element* second;
  int64_t stride;
};

// The rows from row index i on, inputs [k, k + count): as they lie, or copied to `copies`.
template <typename format>
tile_rows<typename format::element> rows_from(const gemm_args& args, int64_t i, int64_t rows,
                                              int64_t k, int64_t count,
                                              typename format::element* copies) {
  using element = typename format::element;
  constexpr int64_t room = gathered_tiles * format::tile_k;
  const element* a = static_cast<const element*>(args.a);
  if (!args.rows) {
    const element* first = a + i * args.k + k;
    return {first, first + amx_rows * args.k, args.k * static_cast<int64_t>(sizeof(element))};
  }
  for (int64_t r = 0; r < rows; ++r) {
    memcpy(copies + r * room, a + args.rows[i + r] * args.k + k,
           static_cast<size_t>(count) * sizeof(element));
  }
  keep_stores();
  return {copies, copies + amx_rows * room, room * static_cast<int64_t>(sizeof(element))};
}

// Up to 16 rows, or where `two` up to 32, from row index i on, times 32 outputs from j on, or where
// not `wide` 16.
template <typename format, bool two, bool wide>
void tile_block(const gemm_args& args, int64_t i, int64_t rows, int64_t j) {
  using element = typename format::element;
  constexpr int64_t room = gathered_tiles * format::tile_k;
  const element* w0 = static_cast<const element*>(args.packed) + j * args.k;
  const element* w1 = w0 + args.k * panel_outputs;
  alignas(64) element copies[2 * amx_rows * room];
  _tile_zero(0);
  _tile_zero(1);
  if (two) {
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t k = 0; k < args.k; k += room) {
    const int64_t count = args.k - k < room ? args.k - k : room;
    const tile_rows<element> a = rows_from<format>(args, i, rows, k, count, copies);
    for (int64_t kk = 0; kk < count; kk += format::tile_k) {
      _tile_loadd(4, a.first + kk, a.stride);
      _tile_loadd(6, w0 + (k + kk) * panel_outputs, 64);
      format::template multiply<0>();
      if (wide) {
        _tile_loadd(7, w1 + (k + kk) * panel_outputs, 64);
        format::template multiply<1>();
      }
      if (two) {
        _tile_loadd(5, a.second + kk, a.stride);
        format::template multiply<2>();
        if (wide) format::template multiply<3>();
      }
    }
  }
  const int64_t first = two ? amx_rows : rows;
  format::template store<0>(args, i, first, j);
  if (wide) format::template store<1>(args, i, first, j + panel_outputs);
  if (two) {
    format::template store<2>(args, i + amx_rows, rows - amx_rows, j);
    if (wide) format::template store<3>(args, i + amx_rows, rows - amx_rows, j + panel_outputs);
  }
}

template <typename format>
[[maybe_unused]] void tile_gemm(const gemm_args& args) {
  for (int64_t i = 0; i < args.m; i += 2 * amx_rows) {
    const int64_t rows = args.m - i < 2 * amx_rows ? args.m - i : 2 * amx_rows;
    configure_tiles(rows);
    const bool two = rows > amx_rows;
    int64_t j = 0;
    for (; j + gemm_n_multiple <= args.n; j += gemm_n_multiple) {
      const auto block = two ? tile_block<format, true, true> : tile_block<format, false, true>;
      block(args, i, rows, j);
    }
    if (j < args.n) {
      const auto block = two ? tile_block<format, true, false> : tile_block<format, false, false>;
      block(args, i, rows, j);
    }
  }
  _tile_release();
}

// The rate of the dot product on tiles that hold zeros (see bench/peak.h).
template <typename format>
[[maybe_unused]] peak_result tile_peak(int64_t iterations, const char* instruction) {
  configure_tiles(2 * amx_rows);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_zero(4);
  _tile_zero(5);
  _tile_zero(6);
  _tile_zero(7);
  for (int64_t it = 0; it < iterations; ++it) {
    format::template multiply<0>();
    format::template multiply<1>();
    format::template multiply<2>();
    format::template multiply<3>();
  }
  alignas(64) int32_t sums[amx_rows * panel_outputs];
  store_tile<0>(sums, 64);
  _tile_release();
  constexpr int64_t per_step = 4 * amx_rows * panel_outputs * format::tile_k * 2;
  return {iterations * per_step, sums[0], instruction};
}

}  // namespace
}  // namespace kt
