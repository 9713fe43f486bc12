// int4_gemm for AMX: the weights of a group are expanded to int8 lines, multiplied in tiles, and
// the group's exact sums are added to the outputs in fp32 before the next group's.
#include <immintrin.h>

#include <cassert>

#include "../int8_gemm/amx_tile.h"
#include "../isa.h"
#include "int4_gemm.h"

namespace kt {
namespace {

constexpr int64_t max_group = 128;
static_assert(max_group <= gathered_tiles * int8_tile::tile_k);

// One panel: `count` inputs from nibbles w + 8 to int8, [count/4][16][4].
void expand(const uint8_t* packed, int64_t count, int8_t* to) {
  const __m256i low = _mm256_set1_epi8(15), zero = _mm256_set1_epi8(int4_zero);
  for (int64_t k = 0; k < count; k += 8, packed += 64, to += 128) {
    for (int64_t half = 0; half < 64; half += 32) {
      const __m256i both = load(packed + half);
      const __m256i first = _mm256_and_si256(both, low);
      const __m256i second = _mm256_and_si256(_mm256_srli_epi16(both, 4), low);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + half), _mm256_sub_epi8(first, zero));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 64 + half),
                          _mm256_sub_epi8(second, zero));
    }
  }
  keep_stores();
}

// Tile c has the sums of group g of `rows` rows from row index i on, and of the panel of output j.
template <int c>
void add_tile(const gemm_args& args, int64_t i, int64_t rows, int64_t j, int64_t g) {
  alignas(64) int32_t sums[amx_rows * panel_outputs];
  store_tile<c>(sums, 64);
  const uint16_t* scale = static_cast<const uint16_t*>(args.w_scale) +
                          j * (args.k / args.group_size) + g * panel_outputs;
  const __m256 scales[2] = {load_bf16(scale), load_bf16(scale + 8)};
  for (int64_t r = 0; r < rows; ++r) {
    float* to = args.c + (i + r) * args.c_stride + j;
    for (int64_t half = 0; half < 2; ++half) {
      const __m256i at = load(sums + r * panel_outputs + 8 * half);
      add_group(to + 8 * half, reinterpret_cast<accumulators>(at), scales[half], g == 0);
    }
  }
}

// Up to 32 rows from row index i on, times 32 outputs from j on.
void block(const gemm_args& args, int64_t i, int64_t rows, int64_t j, int64_t tile_k) {
  const int64_t groups = args.k / args.group_size, size = args.group_size;
  const uint8_t* packed = static_cast<const uint8_t*>(args.packed) + j * args.k / 2;
  const int64_t first = rows < amx_rows ? rows : amx_rows, second = rows - first;
  alignas(64) int8_t copies[2 * amx_rows * gathered_tiles * int8_tile::tile_k];
  alignas(64) int8_t w0[max_group * panel_outputs], w1[max_group * panel_outputs];
  for (int64_t g = 0; g < groups; ++g) {
    const uint8_t* line = packed + g * size * panel_outputs / 2;
    expand(line, size, w0);
    expand(line + args.k * panel_outputs / 2, size, w1);
    const tile_rows<int8_t> a = rows_from<int8_tile>(args, i, rows, g * size, size, copies);
    _tile_zero(0);
    _tile_zero(1);
    if (second) {
      _tile_zero(2);
      _tile_zero(3);
    }
    for (int64_t k = 0; k < size; k += tile_k) {
      _tile_loadd(4, a.first + k, a.stride);
      _tile_loadd(6, w0 + k * panel_outputs, 64);
      _tile_loadd(7, w1 + k * panel_outputs, 64);
      int8_tile::multiply<0>();
      int8_tile::multiply<1>();
      if (second) {
        _tile_loadd(5, a.second + k, a.stride);
        int8_tile::multiply<2>();
        int8_tile::multiply<3>();
      }
    }
    add_tile<0>(args, i, first, j, g);
    add_tile<1>(args, i, first, j + panel_outputs, g);
    if (second) {
      add_tile<2>(args, i + amx_rows, second, j, g);
      add_tile<3>(args, i + amx_rows, second, j + panel_outputs, g);
    }
  }
  for (int64_t r = i; r < i + rows; ++r) {
    const float a_scale = args.a_scale[args.rows ? args.rows[r] : r];
    float* to = args.c + r * args.c_stride + j;
    for (int64_t at = 0; at < gemm_n_multiple; at += 8) multiply_by(to + at, a_scale);
  }
}

}  // namespace

void int4_gemm_amx_int8(const gemm_args& args) {
  record_run(operation::int4_gemm, isa::amx_int8);
  assert(args.k > 0 && args.k % int4_gemm_k_multiple == 0 && args.k % args.group_size == 0);
  assert(args.n % gemm_n_multiple == 0 && args.group_size <= max_group);
  const int64_t tile_k = args.group_size < int8_tile::tile_k ? args.group_size : int8_tile::tile_k;
  for (int64_t i = 0; i < args.m; i += 2 * amx_rows) {
    const int64_t rows = args.m - i < 2 * amx_rows ? args.m - i : 2 * amx_rows;
    configure_tiles(rows, tile_k);
    for (int64_t j = 0; j < args.n; j += gemm_n_multiple) block(args, i, rows, j, tile_k);
  }
  _tile_release();
}

}  // namespace kt
