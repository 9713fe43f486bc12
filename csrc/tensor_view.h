// What the binding takes from a Python tensor: pointer, type and shape, checked.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>
#include <initializer_list>
#include <string>

#include "quantize/quantize.h"

namespace kt {

enum class element : uint8_t {
  bf16,
  fp16,
  fp32,
  int8,
  uint8,
  int16,
  int32,
  int64,
  complex64,
  other
};

constexpr int64_t any_size = -1;

// Borrows: valid while the Python object lives and is not resized.
struct tensor_view {
  void* data;
  element type;
  int dims;
  int64_t shape[4];
};

// Whether an array that is read-only, as a mapped file's may be, will do.
enum class access : uint8_t { read, write };

// Views a contiguous CPU tensor with one of the given types and with that shape (any_size matches
// every size). Raises TypeError or ValueError, naming `name`, what was found and what was expected.
tensor_view view_tensor(nanobind::handle object, const char* name,
                        std::initializer_list<element> types, std::initializer_list<int64_t> shape,
                        access wanted = access::write);

float_type as_float_type(element type);

}  // namespace kt
