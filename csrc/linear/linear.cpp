// Schedule of a dense projection: rows are prepared, then (block of rows, slice of outputs) are
// tasks.
#include "linear.h"

#include <algorithm>

#include "../float_types.h"
#include "../scratch.h"
#include "../slices.h"
#include "../thread_pool.h"

namespace kt {
namespace {

// A slice of weights stays in the second-level cache while the rows of a block pass.
constexpr int64_t block_rows = 256;

struct chunk {
  const kernel_table& kernels;
  const linear_weights& weights;
  const char* x;
  char* out;
  float_type type;
  int64_t rows;
  const slice_tasks& tasks;
  activation_rows prepared;
  float* tiles;  // one per worker

  void prepare(int64_t task) const {
    const int64_t begin = task * rows_per_prepare, k = weights.in_features;
    const int64_t count = std::min(rows - begin, rows_per_prepare);
    prepare_rows(kernels, weights.format, count, k, x + begin * k * float_type_size(type), k, type,
                 prepared, begin);
  }

  void project(int64_t task, int worker) const {
    const slice_task slice = tasks.at(task, worker);
    const int64_t column = slice.column, n = slice.columns;
    const int64_t real = std::min(n, weights.out_features - column);
    const int64_t first = slice.block * block_rows;
    const int64_t end = std::min(first + block_rows, rows);
    const packed_matrix matrix =
        outputs_in(weights.format, slice.part, 0, column, weights.in_features);
    float* tile = tiles + worker * slice_rows * wide_slice;
    for (int64_t row = first; row < end; row += slice_rows) {
      const int64_t count = std::min(end - row, slice_rows);
      multiply(kernels, weights.format, weights.in_features, prepared,
               {count, n, nullptr, row, matrix, tile, wide_slice});
      char* to = out + (row * weights.out_features + column) * float_type_size(type);
      kernels.round_rows({count, real, tile, wide_slice, to, weights.out_features, type});
    }
  }
};

}  // namespace

void linear_forward(const kernel_table& kernels, const linear_weights& weights,
                    const linear_input& input, int64_t begin, int64_t count, int threads) {
  const borrowed_scratch scratch;
  const slice_tasks tasks(weights.matrix, divide_up(count, block_rows), threads);
  const int64_t size = float_type_size(input.type);
  chunk work{kernels,
             weights,
             static_cast<const char*>(input.x) + begin * weights.in_features * size,
             static_cast<char*>(input.out) + begin * weights.out_features * size,
             input.type,
             count,
             tasks,
             scratch->x.reserve(weights.format, count, weights.in_features),
             scratch->tiles.reserve(threads * slice_rows * wide_slice)};
  const phase phases[] = {
      {divide_up(count, rows_per_prepare),
       [](void* context, int64_t task, int) { static_cast<const chunk*>(context)->prepare(task); },
       &work},
      tasks.as_phase([](void* context, int64_t task,
                        int worker) { static_cast<const chunk*>(context)->project(task, worker); },
                     &work),
  };
  run_phases(phases, 2, threads);
}

}  // namespace kt
