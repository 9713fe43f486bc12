// How layers cut their outputs into tasks.
#pragma once

#include <cstdint>

#include "thread_pool.h"
#include "weights/placed.h"

namespace kt {

// Rows and columns of the fp32 tiles between kernels: 16 KiB each, so that they stay in the cache.
constexpr int64_t slice_rows = 64;
constexpr int64_t wide_slice = 64;
constexpr int64_t narrow_slice = 32;
// Below this many tasks per thread the slices are made narrower, to balance the threads.
constexpr int64_t tasks_per_thread = 16;
// Rows that one task prepares for products.
constexpr int64_t rows_per_prepare = 16;
// Tokens that a layer computes at a time where nobody says otherwise: what bounds the scratch.
constexpr int64_t default_chunk_tokens = 1024;

constexpr int64_t divide_up(int64_t value, int64_t divisor) {
  return (value + divisor - 1) / divisor;
}

// A block of rows times a slice of outputs.
struct slice_task {
  const weight_part& part;  // that the slice lies in; of copies, the one for the worker
  int64_t block;
  int64_t column, columns;  // outputs of the matrix
};

// Cuts blocks of rows times the outputs of a weight into tasks. No slice crosses a part, and the
// tasks of a part are a group for the workers of its node. Refers to `weight`.
class slice_tasks {
 public:
  slice_tasks(const placed_weight& weight, int64_t blocks, int threads);

  int64_t outputs() const { return outputs_; }
  int64_t slices() const { return slices_; }  // of every block
  slice_task at(int64_t task, int worker) const;

  // The tasks as a phase; refers to this.
  phase as_phase(void (*run)(void* context, int64_t task, int worker), void* context) const;

 private:
  int ranges() const { return weight_.copies ? 1 : static_cast<int>(weight_.parts.size()); }
  const weight_part& copy_for(int worker) const;

  const placed_weight& weight_;
  int64_t blocks_, outputs_, columns_, slices_;
  task_group groups_[max_task_groups];  // one for each range of outputs
};

}  // namespace kt
