// What the parts of the binding share: how arguments are checked and what errors say.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "isa.h"
#include "tensor_view.h"
#include "weights/format.h"

namespace kt {

using optional_isa = std::optional<std::string>;

[[noreturn]] void value_error(const std::string& message);

constexpr isa highest_isa = isa(isa_count - 1);

// The instruction sets that are allowed and supported, best first.
std::vector<isa> usable_isas(isa cap);

// The one asked for, or the best under the cap of KTRANSFORMERS_ISA. Raises ValueError.
isa chosen_isa(const optional_isa& wanted);

int checked_threads(std::optional<int> threads);
void check_size(const char* name, int64_t value, int64_t maximum);
void check_matrix(int64_t n, int64_t k);

weight_format find_format(const std::string& name);
element scale_element(weight_format format);

template <typename type>
type* data(const tensor_view& view) {
  return static_cast<type*>(view.data);
}

}  // namespace kt
