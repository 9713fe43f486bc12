// How layers cut their outputs into tasks.
#pragma once

#include <cstdint>

namespace kt {

// Rows and columns of the fp32 tiles between kernels: 16 KiB each, so that they stay in the cache.
constexpr int64_t slice_rows = 64;
constexpr int64_t wide_slice = 64;
constexpr int64_t narrow_slice = 32;
// Below this many tasks per thread the slices are made narrower, to balance the threads.
constexpr int64_t tasks_per_thread = 16;
// Rows that one task prepares for products.
constexpr int64_t rows_per_prepare = 16;

constexpr int64_t divide_up(int64_t value, int64_t divisor) {
  return (value + divisor - 1) / divisor;
}

// The width of slices of `outputs`, where each slice of each of `blocks` is a task.
constexpr int64_t slice_columns(int64_t outputs, int64_t blocks, int threads) {
  const int64_t tasks = divide_up(outputs, wide_slice) * blocks;
  return tasks >= tasks_per_thread * threads ? wide_slice : narrow_slice;
}

}  // namespace kt
