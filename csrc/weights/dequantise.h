// Packed weights of any format back to rows of bf16.
#pragma once

#include <cstdint>

#include "rows.h"

namespace kt {

// out [n][out_stride] = the weights [n][k] that a packed matrix stands for, rounded to bf16.
void dequantise(weight_format format, packed_matrix matrix, int64_t n, int64_t k, uint16_t* out,
                int64_t out_stride);

}  // namespace kt
