// The part of the Python binding that is about the steps of attention.
#pragma once

#include <nanobind/nanobind.h>

namespace kt {

void bind_attention_steps(nanobind::module_& m);

}  // namespace kt
