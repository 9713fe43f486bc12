// The two forms, and what they share.
#pragma once

#include "absorbed_plan.h"
#include "attend.h"
#include "mla.h"

namespace kt {

// Sizes that follow from those of the weights.
struct mla_sizes {
  int64_t latent_columns;  // C as products take it
  int64_t latent_width;    // of a row with latent and rope, as products take it
  int64_t query;           // Dn + R: a query of the input
  float scale;             // of scores, in base 2

  mla_sizes(const mla_weights& weights, const mla_input& input);
};

// The position of a sequence's query in it.
inline int64_t query_position(const mla_input& input, int64_t sequence, int64_t token) {
  return input.cache.lengths[sequence] - input.tokens + token;
}

// `count` rows of n values of floats to bf16.
void round_to_bf16(const kernel_table& kernels, int64_t count, int64_t n, const void* x,
                   int64_t x_stride, float_type type, uint16_t* out, int64_t out_stride);

key_parts parts_of(const mla_input& input, int64_t sequence);

void absorbed_forward(const kernel_table& kernels, const mla_weights& weights,
                      const mla_input& input, const mla_chunk& chunk, int threads);
void expanded_forward(const kernel_table& kernels, const mla_weights& weights,
                      const mla_input& input, const mla_chunk& chunk, int threads);

}  // namespace kt
