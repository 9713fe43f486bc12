// The part of the Python binding that is about the machine: topology, NUMA memory.
#pragma once

#include <nanobind/nanobind.h>

#include <memory>
#include <string>
#include <vector>

#include "numa_memory.h"

namespace kt {

// Both raise ValueError.
numa_mode find_numa_mode(const std::string& wanted);
void check_nodes(const std::vector<int>& nodes);

// Memory for a part, bound to its nodes. `bind` stands in for the kernel, unless it is None:
// bind(address, bytes, nodes). Throws std::bad_alloc, or OSError where the kernel refuses.
std::unique_ptr<numa_buffer> bound_memory(const numa_part& part, const nanobind::object& bind);

void bind_numa(nanobind::module_& m);

}  // namespace kt
