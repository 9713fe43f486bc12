// Schedule of the experts: three phases, work split by (expert, slice of outputs).
#include "experts.h"

#include <algorithm>
#include <cstring>

#include "../float_types.h"
#include "../scratch.h"
#include "../slices.h"
#include "../thread_pool.h"

namespace kt {
namespace {

// DeepSeek-V3 routes to 8. Scratch at 1,024 tokens: 8,192 rows of intermediates, 5 bytes per
// element.
constexpr int64_t rows_per_token = 8;

struct chunk {
  const kernel_table& kernels;
  const experts_weights& weights;
  const routing& routed;

  const char* x;
  char* out;
  float_type type;
  int64_t tokens;

  const slice_tasks& gate_up_tasks;  // of blocks of one expert
  const slice_tasks& down_tasks;     // of all tokens
  int64_t intermediate_n;            // as padded

  activation_rows x_rows, h_rows;
  float* h;
  std::atomic<int64_t>* slices_left;  // per block: gate_up tasks that have not finished
  float* tiles;                       // per worker: two tiles, then y of one slice
  int64_t tiles_per_worker;

  void prepare_tokens(int64_t task) const {
    const int64_t begin = task * rows_per_prepare;
    const int64_t rows = std::min(tokens - begin, rows_per_prepare);
    const int64_t d = weights.hidden_size;
    prepare_rows(kernels, weights.format, rows, d, x + begin * d * float_type_size(type), d, type,
                 x_rows, begin);
  }

  void gate_up(int64_t task, int worker) const {
    const weight_format format = weights.format;
    const int64_t d = weights.hidden_size;
    const slice_task slice = gate_up_tasks.at(task, worker);
    const routed_block block = routed.blocks[static_cast<size_t>(slice.block)];
    const int64_t column = slice.column, columns = slice.columns;
    float* gate_tile = tiles + worker * tiles_per_worker;
    float* up_tile = gate_tile + slice_rows * wide_slice;
    const packed_matrix gate = outputs_in(format, slice.part, 2 * block.expert, column, d);
    const packed_matrix up = outputs_in(format, slice.part, 2 * block.expert + 1, column, d);
    for (int64_t done = 0; done < block.rows; done += slice_rows) {
      const int64_t rows = std::min(block.rows - done, slice_rows);
      const int32_t* token = routed.token.data() + block.begin + done;
      multiply(kernels, format, d, x_rows, {rows, columns, token, 0, gate, gate_tile, wide_slice});
      multiply(kernels, format, d, x_rows, {rows, columns, token, 0, up, up_tile, wide_slice});
      kernels.silu_mul({rows, columns, gate_tile, up_tile, wide_slice,
                        h + (block.begin + done) * intermediate_n + column, intermediate_n});
    }
    // Whoever finishes a block's last slice prepares its rows: no phase of its own for that.
    if (slices_left[slice.block].fetch_sub(1, std::memory_order_acq_rel) == 1) {
      prepare_rows(kernels, format, block.rows, weights.moe_intermediate_size,
                   h + block.begin * intermediate_n, intermediate_n, float_type::fp32, h_rows,
                   block.begin);
    }
  }

  // One slice of the output of every token, experts in ascending order.
  void down(int64_t task, int worker) const {
    const weight_format format = weights.format;
    const int64_t f = weights.moe_intermediate_size;
    const slice_task slice = down_tasks.at(task, worker);
    const int64_t column = slice.column, columns = slice.columns;
    float* d_tile = tiles + worker * tiles_per_worker;
    float* y = d_tile + 2 * slice_rows * wide_slice;
    std::memset(y, 0, static_cast<size_t>(tokens * wide_slice) * sizeof(float));
    for (const routed_block& block : routed.blocks) {
      const packed_matrix matrix = outputs_in(format, slice.part, block.expert, column, f);
      for (int64_t done = 0; done < block.rows; done += slice_rows) {
        const int64_t rows = std::min(block.rows - done, slice_rows);
        const int64_t row = block.begin + done;
        multiply(kernels, format, f, h_rows,
                 {rows, columns, nullptr, row, matrix, d_tile, wide_slice});
        kernels.weighted_add({rows, columns, routed.token.data() + row, routed.weight.data() + row,
                              d_tile, wide_slice, y, wide_slice});
      }
    }
    const int64_t real_columns = std::min(columns, weights.hidden_size - column);
    kernels.round_rows({tokens, real_columns, y, wide_slice, out + column * float_type_size(type),
                        weights.hidden_size, type});
  }
};

}  // namespace

int64_t max_chunk_tokens(int64_t top_k, int64_t chunk_tokens) {
  const int64_t rows = rows_per_token * chunk_tokens;
  return std::clamp(rows / std::max<int64_t>(top_k, 1), int64_t{1}, chunk_tokens);
}

void experts_forward(const kernel_table& kernels, const experts_weights& weights,
                     const experts_input& input, int64_t begin, int64_t count, int threads) {
  const borrowed_scratch scratch;
  sort_by_expert(input.routed, begin, count, weights.num_experts, &scratch->routed);
  const int64_t rows = static_cast<int64_t>(scratch->routed.token.size());
  const int64_t blocks = static_cast<int64_t>(scratch->routed.blocks.size());
  const slice_tasks gate_up_tasks(weights.gate_up, blocks, threads);
  const slice_tasks down_tasks(weights.down, 1, threads);
  const int64_t intermediate_n = gate_up_tasks.outputs();
  const int64_t tiles_per_worker = (2 * slice_rows + count) * wide_slice;
  const int64_t first_byte = begin * weights.hidden_size * float_type_size(input.type);

  chunk work{kernels,
             weights,
             scratch->routed,
             static_cast<const char*>(input.hidden_states) + first_byte,
             static_cast<char*>(input.out) + first_byte,
             input.type,
             count,
             gate_up_tasks,
             down_tasks,
             intermediate_n,
             scratch->x.reserve(weights.format, count, weights.hidden_size),
             scratch->h_prepared.reserve(weights.format, rows, weights.moe_intermediate_size),
             scratch->h.reserve(rows * intermediate_n),
             scratch->slices_left.reserve(blocks),
             scratch->tiles.reserve(threads * tiles_per_worker),
             tiles_per_worker};
  for (int64_t i = 0; i < blocks; ++i) {
    work.slices_left[i].store(gate_up_tasks.slices(), std::memory_order_relaxed);
  }
  const phase phases[] = {
      {divide_up(count, rows_per_prepare),
       [](void* context, int64_t task, int) {
         static_cast<const chunk*>(context)->prepare_tokens(task);
       },
       &work},
      gate_up_tasks.as_phase(
          [](void* context, int64_t task, int worker) {
            static_cast<const chunk*>(context)->gate_up(task, worker);
          },
          &work),
      down_tasks.as_phase(
          [](void* context, int64_t task, int worker) {
            static_cast<const chunk*>(context)->down(task, worker);
          },
          &work),
  };
  run_phases(phases, 3, threads);
}

}  // namespace kt
