// Scores, online softmax, weighted values.
#include "attend.h"

#include <algorithm>
#include <iterator>

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
                        block.sum, scratch->factor, scratch->pairs, nullptr});
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

void attend_integers(const kernel_table& kernels, const integer_keys& tile,
                     const query_block& block, const integer_queries& queries, float scale,
                     attend_scratch* scratch) {
  const int64_t columns = padded_columns(block.columns);
  std::fill(scratch->seen + block.columns, scratch->seen + columns, 0);
  std::fill(std::begin(scratch->ones), std::end(scratch->ones), 1.0f);
  kernels.bf16_gemm({tile.keys, columns, tile.rope_width, nullptr, tile.rope, nullptr, nullptr,
                     queries.rope, nullptr, 0, scratch->scores, columns});
  const auto each_group = [&](auto&& step) {
    for (int64_t begin = 0; begin < tile.columns; begin += latent_group) {
      step(begin, std::min(latent_group, tile.columns - begin), begin / latent_group);
    }
  };
  each_group([&](int64_t begin, int64_t width, int64_t g) {
    kernels.int16_gemm({tile.keys, columns, width, tile.rows + begin, tile.stride,
                        tile.scale + g * tile_keys, queries.packed + begin * block_columns,
                        queries.scale + g * block_columns, scratch->ones, scratch->scores,
                        columns});
  });
  kernels.softmax_step({tile.keys, columns, scratch->scores, scale, scratch->seen, block.maximum,
                        block.sum, scratch->factor, nullptr, scratch->scores});
  each_group([&](int64_t begin, int64_t width, int64_t g) {
    kernels.quantize_pairs({tile.keys, columns, scratch->scores, tile.scale + g * tile_keys,
                            scratch->pairs, scratch->p_scale});
    kernels.transpose_pairs(
        {tile.keys / 2, columns, scratch->pairs, columns, scratch->p, tile.keys / 2});
    uint16_t* values = tile.values + begin * tile.keys;
    kernels.pair_rows({tile.keys, width, tile.rows + begin, tile.stride, values});
    kernels.int16_gemm({block.columns, width, tile.keys, scratch->p, tile.keys, scratch->p_scale,
                        values, scratch->ones, scratch->factor, block.acc + begin,
                        block.acc_stride});
  });
}

void pack_queries(const kernel_table& kernels, const uint16_t* rows, int64_t columns, int64_t width,
                  uint16_t* packed) {
  for (int64_t j = 0; j < columns; j += panel_outputs) {
    kernels.transpose_pairs(
        {panel_outputs, width / 2, rows + j * width, width / 2, packed + j * width, panel_outputs});
  }
}

void pack_integer_queries(const kernel_table& kernels, const uint16_t* rows, int64_t columns,
                          int64_t latents, int64_t width, const integer_queries& packed) {
  for (int64_t j = 0; j < columns; j += panel_outputs) {
    const uint16_t* panel = rows + j * width;
    for (int64_t begin = 0; begin < latents; begin += latent_group) {
      const int64_t n = std::min(latent_group, latents - begin);
      uint16_t* q = packed.packed + begin * block_columns + j * n;
      kernels.transpose_pairs({panel_outputs, n / 2, panel + begin, width / 2, q, panel_outputs});
      kernels.quantize_pairs({n, panel_outputs, q, nullptr, q,
                              packed.scale + begin / latent_group * block_columns + j});
    }
    kernels.transpose_pairs({panel_outputs, (width - latents) / 2, panel + latents, width / 2,
                             packed.rope + j * (width - latents), panel_outputs});
  }
}

}  // namespace kt
