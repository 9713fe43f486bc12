// The part of the Python binding that is about the machine: topology, NUMA memory.
#pragma once

#include <nanobind/nanobind.h>

namespace kt {

void bind_numa(nanobind::module_& m);

}  // namespace kt
