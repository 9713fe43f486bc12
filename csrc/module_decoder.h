// The part of the Python binding that is about decoder layers.
#pragma once

#include <nanobind/nanobind.h>

namespace kt {

void bind_decoder(nanobind::module_& m);

}  // namespace kt
