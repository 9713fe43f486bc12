// One tile of keys against one block of queries: what both forms of attention have in common.
#pragma once

#include "keys.h"

namespace kt {

// Queries are the columns of the scores: the weights of a product whose rows are keys.
constexpr int64_t block_columns = 64;

// The state of up to block_columns queries.
struct query_block {
  int64_t columns;
  const uint16_t* packed;  // as the weights of a bf16_gemm, columns padded to panels
  float* maximum;          // [columns padded]
  float* sum;              // [columns padded]
  float* acc;              // [columns][acc_stride]
  int64_t acc_stride;
};

// Keys and values of a tile, for one head or for all.
struct key_values {
  int64_t keys;  // multiple of bf16_gemm_k_multiple
  const uint16_t* rows;
  int64_t width;           // of a key: multiple of bf16_gemm_k_multiple
  const uint16_t* values;  // as the weights of a bf16_gemm whose inputs are the keys
  int64_t value_width;     // multiple of bf16_gemm_n_multiple
};

// Room for the intermediates of a step.
struct attend_scratch {
  alignas(64) float scores[tile_keys * block_columns];
  alignas(64) float product[block_columns * 128];
  alignas(64) uint16_t pairs[tile_keys * block_columns];
  alignas(64) uint16_t p[block_columns * tile_keys];
  alignas(64) float factor[block_columns];
  alignas(64) int32_t seen[block_columns];
};

constexpr int64_t padded_columns(int64_t columns) { return round_up(columns, panel_outputs); }

void begin_block(const query_block& block);

// Adds a tile to a block; scratch->seen says how many of the keys each column sees.
void attend(const kernel_table& kernels, const key_values& tile, const query_block& block,
            float scale, attend_scratch* scratch);

// Packs queries [columns][width] bf16, all of whose panels can be read.
void pack_queries(const kernel_table& kernels, const uint16_t* rows, int64_t columns, int64_t width,
                  uint16_t* packed);

}  // namespace kt
