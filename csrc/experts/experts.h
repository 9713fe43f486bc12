// The routed experts of a mixture-of-experts layer, with weights in any format.
//
//   x^  = prepare(x)                                              once per token
//   h_r = silu(gate_e x^_t) * (up_e x^_t),  h^_r = prepare(h_r)   per routed row r = (t, e)
//   y_t = sum over the token's rows of weight_r * (down_e h^_r)
//
// where `prepare` quantises a row to int8, or rounds it to bf16 where weights are (weights/rows.h);
// summed from 0 in ascending expert index (an expert that a token names twice: ascending slot).
// A token's output depends on that token alone, not on the others in the call or on the number of
// threads; with integer weights not on the instruction set either.
#pragma once

#include <cstdint>

#include "../kernels.h"
#include "../slices.h"
#include "../weights/placed.h"
#include "routing.h"

namespace kt {

// Owned by the caller. Of each expert gate_up holds gate and then up: two matrices.
struct experts_weights {
  weight_format format;
  int64_t num_experts;
  int64_t hidden_size;
  int64_t moe_intermediate_size;
  placed_weight gate_up;
  placed_weight down;
};

struct experts_input {
  routing_input routed;       // indices in range
  const void* hidden_states;  // [tokens][hidden_size]
  void* out;                  // [tokens][hidden_size]; may be hidden_states
  float_type type;            // of both: bf16 or fp32
};

// The tokens to give to one call of experts_forward, whose scratch memory grows with them and their
// routed rows: `chunk_tokens`, or fewer where more than 8 experts are routed to.
int64_t max_chunk_tokens(int64_t top_k, int64_t chunk_tokens = default_chunk_tokens);

// Computes tokens [begin, begin + count).
void experts_forward(const kernel_table& kernels, const experts_weights& weights,
                     const experts_input& input, int64_t begin, int64_t count, int threads);

}  // namespace kt
