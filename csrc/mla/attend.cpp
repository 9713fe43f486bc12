// Scores, online softmax, weighted values.
#include "attend.h"

#include <algorithm>

namespace kt {
namespace {

constexpr int64_t value_slice = sizeof(attend_scratch::product) / sizeof(float) / block_columns;

}  // namespace

void begin_block(const query_block& block) {
  std::fill_n(block.maximum, padded_columns(block.columns), no_maximum);
  std::fill_n(block.sum, padded_columns(block.columns), 0.0f);
  for (int64_t i = 0; i < block.columns; ++i) {
    std::fill_n(block.acc + i * block.acc_stride, block.acc_stride, 0.0f);
  }
}

void attend(const kernel_table& kernels, const key_values& tile, const query_block& block,
            float scale, attend_scratch* scratch) {
  const int64_t columns = padded_columns(block.columns);
  std::fill(scratch->seen + block.columns, scratch->seen + columns, 0);
  kernels.bf16_gemm({tile.keys, columns, tile.width, nullptr, tile.rows, nullptr, nullptr,
                     block.packed, nullptr, 0, scratch->scores, columns});
  kernels.softmax_step({tile.keys, columns, scratch->scores, scale, scratch->seen, block.maximum,
                        block.sum, scratch->factor, scratch->pairs});
  kernels.transpose_pairs(
      {tile.keys / 2, columns, scratch->pairs, columns, scratch->p, tile.keys / 2});
  for (int64_t j = 0; j < tile.value_width; j += value_slice) {
    const int64_t n = std::min(value_slice, tile.value_width - j);
    kernels.bf16_gemm({block.columns, n, tile.keys, nullptr, scratch->p, nullptr, nullptr,
                       tile.values + j * tile.keys, nullptr, 0, scratch->product, n});
    kernels.rescale_add(
        {block.columns, n, scratch->factor, scratch->product, n, block.acc + j, block.acc_stride});
  }
}

void pack_queries(const kernel_table& kernels, const uint16_t* rows, int64_t columns, int64_t width,
                  uint16_t* packed) {
  for (int64_t j = 0; j < columns; j += panel_outputs) {
    kernels.transpose_pairs(
        {panel_outputs, width / 2, rows + j * width, width / 2, packed + j * width, panel_outputs});
  }
}

}  // namespace kt
