// The part of the Python binding that packs plain tensors.
#pragma once

#include <nanobind/nanobind.h>

namespace kt {

void bind_pack_experts(nanobind::module_& m);

}  // namespace kt
