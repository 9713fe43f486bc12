// Activations as the matrix product of a weight format takes them.
#pragma once

#include <cstdint>

#include "../kernels.h"
#include "format.h"

namespace kt {

// Rows in the format's form: int8 with a scale per row and sums (per row, or per group of k), or
// bf16. `values` are [..][k as padded].
struct activation_rows {
  char* values;
  float* scale;
  int32_t* row_sum;
  int32_t* group_sum;
};

// Bytes of one row's values, and its group sums, for k inputs.
int64_t row_bytes(weight_format format, int64_t k);
int64_t row_groups(weight_format format, int64_t k);

// Rows [first, first + count) of `to` from x [count][x_stride], k values each.
void prepare_rows(const kernel_table& kernels, weight_format format, int64_t count, int64_t k,
                  const void* x, int64_t x_stride, float_type type, const activation_rows& to,
                  int64_t first);

// The packed weights of one matrix, or of its outputs from a multiple of 32 on.
struct packed_matrix {
  const char* packed;
  const char* scale;
};
packed_matrix outputs_from(weight_format format, packed_matrix matrix, int64_t output, int64_t k);

// c [m][c_stride] = rows of a times the first n outputs. `index` picks rows of `a` from `first`
// on, or is nullptr: all in order. n is a multiple of 32.
struct product {
  int64_t m, n;
  const int32_t* index;
  int64_t first;
  packed_matrix weights;
  float* c;
  int64_t c_stride;
};
operation product_of(weight_format format);
void multiply(const kernel_table& kernels, weight_format format, int64_t k,
              const activation_rows& a, const product& of);

}  // namespace kt
