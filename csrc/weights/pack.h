// Packs one weight matrix into the layout of its format, and reads it back.
#pragma once

#include <cstdint>

#include "../kernels.h"
#include "format.h"

namespace kt {

struct non_finite {
  int64_t count;        // NaN and infinite values in the weight
  int64_t row, column;  // of the first
};

// weight [n][k] -> packed and scale, zero in the padding. Where the result's count is not 0, what
// was written is of no use.
non_finite pack(const kernel_table& kernels, weight_format format, const void* weight,
                float_type type, int64_t n, int64_t k, void* packed, void* scale);

// packed -> q [n][k]: int8 integers, or bf16 in that format
void unpack(weight_format format, const void* packed, int64_t n, int64_t k, void* q);

}  // namespace kt
