// The part of the Python binding that other engines use: work handed in now and waited for later.
#pragma once

#include <nanobind/nanobind.h>

namespace kt {

void bind_engine(nanobind::module_& m);

}  // namespace kt
