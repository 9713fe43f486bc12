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

// Queries of a block in 16 bits, packed as the weights of products, with a scale for each group of
// latents; of their rope parts as the weights of a bf16_gemm.
struct integer_queries {
  uint16_t* packed;  // of group g [columns padded][its width] at g * latent_group * block_columns
  float* scale;      // [groups][block_columns]
  uint16_t* rope;
};

// Int8 latents of a tile, all heads' keys and values, as gathered (keys.h).
struct integer_keys {
  int64_t keys;          // multiple of bf16_gemm_k_multiple
  int64_t columns;       // latents, padded
  const uint16_t* rows;  // int16 [keys][stride]
  int64_t stride;
  const float* scale;    // [groups][tile_keys]
  const uint16_t* rope;  // [keys][rope_width]
  int64_t rope_width;    // multiple of bf16_gemm_k_multiple
  uint16_t* values;      // [columns][keys]: room for the rows as the weights of products
};

// Room for the intermediates of a step.
struct attend_scratch {
  alignas(64) float scores[tile_keys * block_columns];
  alignas(64) float product[block_columns * 128];
  alignas(64) uint16_t pairs[tile_keys * block_columns];
  alignas(64) uint16_t p[block_columns * tile_keys];
  alignas(64) float p_scale[block_columns];
  alignas(64) float ones[latent_group];
  alignas(64) float factor[block_columns];
  alignas(64) int32_t seen[block_columns];
};

constexpr int64_t padded_columns(int64_t columns) { return round_up(columns, panel_outputs); }

void begin_block(const query_block& block);

// Adds a tile to a block; scratch->seen says how many of the keys each column sees.
void attend(const kernel_table& kernels, const key_values& tile, const query_block& block,
            float scale, attend_scratch* scratch);

// The same with int8 latents; block.packed is not used.
void attend_integers(const kernel_table& kernels, const integer_keys& tile,
                     const query_block& block, const integer_queries& queries, float scale,
                     attend_scratch* scratch);

// Packs queries [columns][width] bf16, all of whose panels can be read.
void pack_queries(const kernel_table& kernels, const uint16_t* rows, int64_t columns, int64_t width,
                  uint16_t* packed);

// Packs queries [columns][width] bf16, whose first values are for latents and whose others are rope
// parts, all of whose panels can be read.
void pack_integer_queries(const kernel_table& kernels, const uint16_t* rows, int64_t columns,
                          int64_t latents, int64_t width, const integer_queries& packed);

}  // namespace kt
