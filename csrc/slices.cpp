// Cuts outputs into tasks. See slices.h.
#include "slices.h"

#include <algorithm>
#include <cassert>

namespace kt {

slice_tasks::slice_tasks(const placed_weight& weight, int64_t blocks, int threads)
    : weight_(weight), blocks_(blocks), outputs_(0), slices_(0) {
  assert(ranges() >= 1 && ranges() <= max_task_groups);
  for (int i = 0; i < ranges(); ++i) outputs_ += weight.parts[static_cast<size_t>(i)].outputs;
  const bool enough = divide_up(outputs_, wide_slice) * blocks >= tasks_per_thread * threads;
  columns_ = enough ? wide_slice : narrow_slice;
  for (int i = 0; i < ranges(); ++i) {
    const weight_part& part = weight.parts[static_cast<size_t>(i)];
    const int64_t slices = divide_up(part.outputs, columns_);
    groups_[i] = {part.node, blocks * slices};
    slices_ += slices;
  }
}

slice_task slice_tasks::at(int64_t task, int worker) const {
  int range = 0;
  for (; task >= groups_[range].tasks; ++range) task -= groups_[range].tasks;
  const weight_part& part =
      weight_.copies ? copy_for(worker) : weight_.parts[static_cast<size_t>(range)];
  const int64_t slices = groups_[range].tasks / blocks_;
  const int64_t first = task % slices * columns_;
  return {part, task / slices, part.first_output + first, std::min(columns_, part.outputs - first)};
}

phase slice_tasks::as_phase(void (*run)(void*, int64_t, int), void* context) const {
  return {blocks_ * slices_, run, context, groups_, ranges()};
}

const weight_part& slice_tasks::copy_for(int worker) const {
  const std::vector<weight_part>& parts = weight_.parts;
  if (parts.size() == 1) return parts.front();
  const int node = worker_node(worker);
  for (const weight_part& part : parts) {
    if (part.node == node) return part;
  }
  // A node without a copy: its workers spread over the copies there are.
  return parts[static_cast<size_t>(worker) % parts.size()];
}

}  // namespace kt
