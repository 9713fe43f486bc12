// The part of the Python binding that is about attention.
#pragma once

#include <nanobind/nanobind.h>

namespace kt {

void bind_mla(nanobind::module_& m);

}  // namespace kt
