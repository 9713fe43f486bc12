// Tiles of the cache: tokens gathered from pages into rows of bf16.
#pragma once

#include "mla.h"

namespace kt {

// Keys per tile: what the online softmax takes in one step.
constexpr int64_t tile_keys = 64;

// Latents of some tokens of one sequence, in ascending order, without padding.
struct key_tile {
  int64_t keys;                  // 0 where nothing was left
  int64_t padded_keys;           // a multiple of what products take; rows beyond `keys` are zero
  int32_t positions[tile_keys];  // which token each key is
  int64_t next;                  // the token after them

  // Of these keys, those that the query at a position sees.
  int32_t seen_from(int64_t position) const;
};

// Where the C and the R values of a key go: rows of `columns`, zeros after the values, `stride`
// from row to row.
struct key_rows {
  uint16_t* rows;
  int64_t columns, stride;
};
struct key_destination {
  key_rows latent, rope;
};

// Where int8 latents go as they are, and their scales.
struct integer_destination {
  uint16_t* rows;           // int16 [tile_keys][stride]
  int64_t columns, stride;  // zeros from the values to `columns`
  float* scale;             // [groups][tile_keys]
  key_rows rope;
};

// Gathers up to tile_keys tokens of `sequence` from [begin, end).
void gather_keys(const kernel_table& kernels, const mla_weights& weights, const latent_cache& cache,
                 int64_t sequence, int64_t begin, int64_t end, const key_destination& to,
                 key_tile* tile);
void gather_keys(const kernel_table& kernels, const mla_weights& weights, const latent_cache& cache,
                 int64_t sequence, int64_t begin, int64_t end, const integer_destination& to,
                 key_tile* tile);

}  // namespace kt
