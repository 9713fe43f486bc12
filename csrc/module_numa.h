// The part of the Python binding that is about the machine: topology, NUMA memory.
#pragma once

#include <nanobind/nanobind.h>

#include <string>
#include <vector>

#include "numa_memory.h"

namespace kt {

// Both raise ValueError.
numa_mode find_numa_mode(const std::string& wanted);
void check_nodes(const std::vector<int>& nodes);

void bind_numa(nanobind::module_& m);

}  // namespace kt
