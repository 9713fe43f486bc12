// The part of the Python binding that is about layers: the routed experts, a dense projection.
#pragma once

#include <nanobind/nanobind.h>

namespace kt {

void bind_layers(nanobind::module_& m);

}  // namespace kt
