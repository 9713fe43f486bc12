// The part of the Python binding that is about layers: the routed experts, a dense projection.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>

#include "experts/experts.h"
#include "linear/linear.h"

namespace kt {

void bind_layers(nanobind::module_& m);

// What the classes Linear and Experts compute with, valid while the object lives. Both raise
// TypeError, naming `name`, for another object.
const linear_weights& linear_weights_of(nanobind::handle object, const char* name);
const experts_weights& experts_weights_of(nanobind::handle object, const char* name);

// Computes so many rows with the class Linear, as its forward does.
void linear_rows(nanobind::handle layer, const linear_input& input, int64_t rows);

// A call of the class Experts, checked but for its indices; layer and tensors must outlive it.
struct experts_call {
  const void* layer;
  experts_input input;
  int64_t step;  // tokens to compute at a time
};

bool is_experts(nanobind::handle object);

// Raises TypeError or ValueError, as Experts.forward does.
experts_call view_experts_call(nanobind::handle layer, nanobind::handle hidden_states,
                               nanobind::handle top_k_index, nanobind::handle top_k_weights,
                               nanobind::handle out);

// Neither needs the GIL. The first throws what Python will see as ValueError.
void check_indices(const experts_call& call);
void compute(const experts_call& call, int64_t begin, int64_t count);

}  // namespace kt
