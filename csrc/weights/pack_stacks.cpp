// One task per matrix.
#include "pack_stacks.h"

#include "../float_types.h"
#include "../thread_pool.h"

namespace kt {
namespace {

struct packing {
  const kernel_table& kernels;
  weight_format format;
  const matrix_stack* stacks;
  int count;
  int64_t begin;
  non_finite* found;

  void pack_one(int64_t task) const {
    const matrix_stack& stack = stacks[task % count];
    const int64_t i = begin + task / count;
    const char* weight = static_cast<const char*>(stack.weight);
    found[task] =
        pack(kernels, format, weight + i * stack.n * stack.k * float_type_size(stack.type),
             stack.type, stack.n, stack.k, stack.packed + i * stack.packed_stride,
             stack.scale + i * stack.scale_stride);
  }
};

}  // namespace

void pack_stacks(const kernel_table& kernels, weight_format format, const matrix_stack* stacks,
                 int count, int64_t begin, int64_t end, int threads, non_finite* found) {
  packing work{kernels, format, stacks, count, begin, found};
  const phase phases[] = {
      {(end - begin) * count,
       [](void* context, int64_t task, int) {
         static_cast<const packing*>(context)->pack_one(task);
       },
       &work},
  };
  run_phases(phases, 1, threads);
}

}  // namespace kt
