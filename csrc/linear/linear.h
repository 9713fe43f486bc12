// A dense projection with weights in any format: y = W prepare(x), where `prepare` quantises a row
// to int8, or rounds it to bf16 where weights are (weights/rows.h). A row's output depends on that
// row alone, and with integer weights not on the instruction set.
#pragma once

#include <cstdint>

#include "../kernels.h"
#include "../slices.h"
#include "../weights/placed.h"

namespace kt {

// Owned by the caller.
struct linear_weights {
  weight_format format;
  int64_t in_features;
  int64_t out_features;
  placed_weight matrix;
};

struct linear_input {
  const void* x;    // [rows][in_features]
  void* out;        // [rows][out_features]; must not overlap x
  float_type type;  // of both: bf16 or fp32
};

// Computes rows [begin, begin + count); the scratch memory grows with them. Callers who have many
// take default_chunk_tokens at a time.
void linear_forward(const kernel_table& kernels, const linear_weights& weights,
                    const linear_input& input, int64_t begin, int64_t count, int threads);

}  // namespace kt
