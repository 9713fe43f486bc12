// Gathers runs of tokens that lie side by side in a page.
#include "keys.h"

#include <algorithm>

#include "../bf16_gemm/bf16_gemm.h"
#include "../float_types.h"
#include "../slices.h"
#include "forms.h"

namespace kt {
namespace {

// `count` rows of n floats, which begin at element `first`, to bf16 from a row of `to` on.
void copy_rows(const kernel_table& kernels, const void* x, float_type type, int64_t first,
               int64_t count, int64_t n, const key_rows& to, int64_t row) {
  const char* from = static_cast<const char*>(x) + first * float_type_size(type);
  round_to_bf16(kernels, count, n, from, n, type, to.rows + row * to.stride, to.stride);
}

void zero(const key_rows& to, int64_t row, int64_t column) {
  std::fill(to.rows + row * to.stride + column, to.rows + row * to.stride + to.columns,
            uint16_t{0});
}

// `count` tokens that follow `slot`, a row of a page, to rows from `first` on.
void copy_run(const kernel_table& kernels, const mla_weights& weights, const latent_cache& cache,
              int64_t slot, int64_t count, const key_destination& to, int64_t first) {
  const int64_t c = weights.latent, r = weights.rope;
  if (cache.type == latent_type::int8) {
    kernels.dequantise_rows({count, c, latent_group,
                             static_cast<const int8_t*>(cache.latent) + slot * c,
                             cache.scale + slot * latent_groups(c),
                             to.latent.rows + first * to.latent.stride, to.latent.stride});
  } else {
    const float_type type = cache.type == latent_type::bf16 ? float_type::bf16 : float_type::fp32;
    copy_rows(kernels, cache.latent, type, slot * c, count, c, to.latent, first);
  }
  copy_rows(kernels, cache.rope, cache.rope_type, slot * r, count, r, to.rope, first);
  for (int64_t i = first; i < first + count; ++i) {
    zero(to.latent, i, c);
    zero(to.rope, i, r);
  }
}

// The same of int8 latents as they are.
void copy_run(const kernel_table& kernels, const mla_weights& weights, const latent_cache& cache,
              int64_t slot, int64_t count, const integer_destination& to, int64_t first) {
  const int64_t c = weights.latent, r = weights.rope, groups = latent_groups(c);
  uint16_t* rows = to.rows + first * to.stride;
  kernels.widen_rows(
      {count, c, static_cast<const int8_t*>(cache.latent) + slot * c, rows, to.stride});
  copy_rows(kernels, cache.rope, cache.rope_type, slot * r, count, r, to.rope, first);
  for (int64_t i = 0; i < count; ++i) {
    std::fill(rows + i * to.stride + c, rows + i * to.stride + to.columns, uint16_t{0});
    zero(to.rope, first + i, r);
    for (int64_t g = 0; g < groups; ++g) {
      to.scale[g * tile_keys + first + i] = cache.scale[(slot + i) * groups + g];
    }
  }
}

// Zeros for a key that is none.
void clear(const key_destination& to, int64_t row) {
  zero(to.latent, row, 0);
  zero(to.rope, row, 0);
}

void clear(const integer_destination& to, int64_t row) {
  std::fill_n(to.rows + row * to.stride, to.columns, uint16_t{0});
  zero(to.rope, row, 0);
  for (int64_t g = 0; g * latent_group < to.columns; ++g) to.scale[g * tile_keys + row] = 0.0f;
}

template <typename destination>
void gather(const kernel_table& kernels, const mla_weights& weights, const latent_cache& cache,
            int64_t sequence, int64_t begin, int64_t end, const destination& to, key_tile* tile) {
  const int32_t* pages = cache.block_table + sequence * cache.max_pages;
  const uint8_t* valid = cache.valid ? cache.valid + sequence * cache.valid_stride : nullptr;
  tile->keys = 0;
  int64_t token = begin;
  while (token < end && tile->keys < tile_keys) {
    if (valid && !valid[token]) {
      ++token;
      continue;
    }
    const int64_t page = token / cache.page_tokens, row = token % cache.page_tokens;
    const int64_t most = std::min({end - token, cache.page_tokens - row, tile_keys - tile->keys});
    int64_t count = 0;
    while (count < most && (!valid || valid[token + count])) {
      tile->positions[tile->keys + count] = static_cast<int32_t>(token + count);
      ++count;
    }
    copy_run(kernels, weights, cache, pages[page] * cache.page_tokens + row, count, to, tile->keys);
    tile->keys += count;
    token += count;
  }
  tile->next = token;
  tile->padded_keys = round_up(tile->keys, bf16_gemm_k_multiple);
  for (int64_t i = tile->keys; i < tile->padded_keys; ++i) clear(to, i);
}

}  // namespace

int32_t key_tile::seen_from(int64_t position) const {
  if (keys > 0 && positions[keys - 1] <= position) return static_cast<int32_t>(keys);
  return static_cast<int32_t>(std::upper_bound(positions, positions + keys, position) - positions);
}

void gather_keys(const kernel_table& kernels, const mla_weights& weights, const latent_cache& cache,
                 int64_t sequence, int64_t begin, int64_t end, const key_destination& to,
                 key_tile* tile) {
  gather(kernels, weights, cache, sequence, begin, end, to, tile);
}

void gather_keys(const kernel_table& kernels, const mla_weights& weights, const latent_cache& cache,
                 int64_t sequence, int64_t begin, int64_t end, const integer_destination& to,
                 key_tile* tile) {
  gather(kernels, weights, cache, sequence, begin, end, to, tile);
}

}  // namespace kt
