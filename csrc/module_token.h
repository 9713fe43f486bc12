// The part of the Python binding that is about a whole token.
#pragma once

#include <nanobind/nanobind.h>

namespace kt {

void bind_token(nanobind::module_& m);

}  // namespace kt
