// Packs many matrices of one shape on the pool: those of a layer's experts.
#pragma once

#include <cstdint>

#include "pack.h"

namespace kt {

// Matrices [n][k], back to back, and where the packed ones go, so many bytes apart.
struct matrix_stack {
  const void* weight;
  float_type type;
  int64_t n, k;
  char* packed;
  int64_t packed_stride;
  char* scale;
  int64_t scale_stride;
};

// Packs matrices [begin, end) of every stack. found[(i - begin) * count + s] tells of matrix i of
// stack s what `pack` returns. Throws what run_phases throws.
void pack_stacks(const kernel_table& kernels, weight_format format, const matrix_stack* stacks,
                 int count, int64_t begin, int64_t end, int threads, non_finite* found);

}  // namespace kt
