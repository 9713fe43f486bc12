// The part of the Python binding that is about decoder layers.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>

#include "kernels.h"
#include "module_mla.h"
#include "tensor_view.h"

namespace kt {

void bind_decoder(nanobind::module_& m);

// What the class DecoderLayer takes and gives, and computes with; valid while the object lives.
struct decoder_rows {
  int64_t hidden_size;
  element type;
  const kernel_table* kernels;
};

// Raises TypeError, naming `name`, for another object.
decoder_rows decoder_rows_of(nanobind::handle object, const char* name);

// Computes such a layer for a new token of each sequence, without padding: x and out are
// [batch][hidden_size] and must not overlap. Raises as its forward does.
void decode_rows(nanobind::handle layer, int64_t batch, const void* x, void* out,
                 nanobind::handle cos, nanobind::handle sin, const cache_arguments& cached);

}  // namespace kt
