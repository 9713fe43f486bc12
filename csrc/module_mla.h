// The part of the Python binding that is about attention.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>

#include "mla/mla.h"

namespace kt {

// What the class MlaAttention computes with, valid while the object lives. Raises TypeError.
const mla_weights& mla_weights_of(nanobind::handle object);

// What one call of it takes beside queries.
struct cache_arguments {
  nanobind::handle latent, latent_scale, rope, block_table, lengths, valid;
};

// Views them for so many sequences with so many new tokens each. Raises TypeError or ValueError.
latent_cache view_cache(const mla_weights& weights, int64_t batch, int64_t tokens,
                        const cache_arguments& arguments);

void bind_mla(nanobind::module_& m);

}  // namespace kt
