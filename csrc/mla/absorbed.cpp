// The absorbed form, in three phases: queries into the space of latents; (block of queries, part of
// the keys) for all heads; parts together, and back into the space of values.
#include <algorithm>
#include <cstring>

#include "../attention/exp2.h"
#include "../float_types.h"
#include "../scratch.h"
#include "../slices.h"
#include "../thread_pool.h"
#include "forms.h"
#include "scratch_parts.h"

namespace kt {
namespace {

// Rows of queries that one task takes of a head, in and out.
constexpr int64_t task_rows = slice_rows;
// A cache line of 16 bits: 64 rows of 1024 bytes would share four sets of a first-level cache.
constexpr int64_t row_padding = 32;

struct worker_memory {
  attend_scratch* steps;
  uint16_t* packed;                // a block's queries
  uint16_t *rows, *values;         // a tile's keys
  float *query_scale, *key_scale;  // [groups][..], where latents are taken as integers
  float *maximum, *sum;            // a block's
  float *tile, *latent_rows;       // fp32 of products; combined latents
  int32_t* zeros;                  // a part's row of the sum
  float* part_weights;
  uintptr_t end;

  worker_memory(memory_cutter memory, const mla_sizes& sizes, int64_t parts)
      : steps(memory.cut<attend_scratch>(1)),
        packed(memory.cut<uint16_t>(block_columns * sizes.latent_width)),
        rows(memory.cut<uint16_t>(tile_keys * (sizes.latent_width + row_padding))),
        values(memory.cut<uint16_t>(tile_keys * sizes.latent_columns)),
        query_scale(memory.cut<float>(latent_groups(sizes.latent_columns) * block_columns)),
        key_scale(memory.cut<float>(latent_groups(sizes.latent_columns) * tile_keys)),
        maximum(memory.cut<float>(block_columns)),
        sum(memory.cut<float>(block_columns)),
        tile(memory.cut<float>(task_rows * wide_slice)),
        latent_rows(memory.cut<float>(task_rows * sizes.latent_columns)),
        zeros(memory.cut<int32_t>(parts)),
        part_weights(memory.cut<float>(parts)),
        end(memory.end()) {}
};

// A block's queries [columns][latent_width], from `column` of a sequence on, and their keys.
struct part_of_keys {
  const sequence_rows& of;
  int64_t column;
  const uint16_t* queries;
  int64_t begin, end;  // tokens
};

struct absorbed_work {
  const kernel_table& kernels;
  const mla_weights& weights;
  const mla_input& input;
  const mla_chunk& chunk;
  const mla_sizes& sizes;
  const absorbed_plan& plan;

  activation_rows prepared;  // task_rows per worker
  uint16_t* queries;         // [sequences * tokens][heads][latent_width]
  float* partial;            // sums of latents, [partial rows][latent_columns]
  float *maximum, *sum;      // of each partial row
  char* workers;
  int64_t worker_bytes;

  worker_memory memory_of(int worker) const {
    return {memory_cutter(workers + worker * worker_bytes), sizes, plan.most_parts};
  }
  int64_t token_rows() const { return chunk.sequences * chunk.tokens; }
  // The chunk's queries lie side by side in the input: they are all of each sequence, or of one.
  int64_t first_row() const { return chunk.first_sequence * input.tokens + chunk.first_token; }
  int64_t columns() const { return chunk.tokens * weights.heads; }
  packed_matrix head(packed_matrix all, int64_t h, int64_t n, int64_t k) const {
    return {all.packed + h * packed_bytes(weights.format, n, k),
            all.scale + h * scale_count(weights.format, n, k) * scale_size(weights.format)};
  }

  void absorb(int64_t task, int worker) const;
  void attend_part(int64_t task, int worker) const;
  void attend_floats(const part_of_keys& part, const query_block& block,
                     const worker_memory& memory) const;
  void attend_int8(const part_of_keys& part, const query_block& block,
                   const worker_memory& memory) const;
  template <typename destination, typename step_fn>
  void each_tile(const part_of_keys& part, const destination& to, int64_t count,
                 const worker_memory& memory, step_fn&& step) const;
  int64_t position(const sequence_rows& of, int64_t column) const {
    return query_position(input, of.sequence, chunk.first_token + column / weights.heads);
  }
  void combine(const sequence_rows& of, int64_t column, const worker_memory& memory,
               float* out) const;
  void project(int64_t task, int worker) const;
};

// q_c of one head for a slice of queries, and their rope part beside it.
void absorbed_work::absorb(int64_t task, int worker) const {
  const int64_t h = task % weights.heads, begin = task / weights.heads * task_rows;
  const int64_t rows = std::min(task_rows, token_rows() - begin);
  const int64_t stride = weights.heads * sizes.query, size = float_type_size(input.type);
  const char* q =
      static_cast<const char*>(input.q) + ((first_row() + begin) * stride + h * sizes.query) * size;
  const int64_t out_stride = weights.heads * sizes.latent_width;
  uint16_t* out = queries + (begin * weights.heads + h) * sizes.latent_width;
  const int64_t first = worker * task_rows;
  prepare_rows(kernels, weights.format, rows, weights.nope, q, stride, input.type, prepared, first);
  const packed_matrix uk = head(weights.uk, h, weights.latent, weights.nope);
  const worker_memory memory = memory_of(worker);
  for (int64_t j = 0; j < sizes.latent_columns; j += wide_slice) {
    const int64_t n = std::min(wide_slice, sizes.latent_columns - j);
    multiply(kernels, weights.format, weights.nope, prepared,
             {rows, n, nullptr, first, outputs_from(weights.format, uk, j, weights.nope),
              memory.tile, wide_slice});
    kernels.round_rows({rows, n, memory.tile, wide_slice, out + j, out_stride, float_type::bf16});
  }
  const int64_t rope = sizes.latent_columns;
  round_to_bf16(kernels, rows, weights.rope, q + weights.nope * size, stride, input.type,
                out + rope, out_stride);
  for (int64_t i = 0; i < rows; ++i) {
    uint16_t* one = out + i * out_stride;
    std::fill(one + rope + weights.rope, one + sizes.latent_width, uint16_t{0});
  }
}

// The partial sums of a block of queries over a part of the keys.
void absorbed_work::attend_part(int64_t number, int worker) const {
  const attend_task& task = plan.tasks[static_cast<size_t>(number)];
  const sequence_rows& of = plan.sequences[static_cast<size_t>(task.index)];
  const worker_memory memory = memory_of(worker);
  const int64_t row = of.first_partial + task.part * columns() + task.column;
  const query_block block{task.columns,
                          memory.packed,
                          memory.maximum,
                          memory.sum,
                          partial + row * sizes.latent_columns,
                          sizes.latent_columns};
  begin_block(block);
  const int64_t last = position(of, task.column + task.columns - 1);
  const part_of_keys part{
      of, task.column, queries + (task.index * columns() + task.column) * sizes.latent_width,
      task.part * of.parts.keys, std::min((task.part + 1) * of.parts.keys, last + 1)};
  if (input.cache.type == latent_type::int8 && !kernels.bf16_in_tiles) {
    attend_int8(part, block, memory);
  } else {
    attend_floats(part, block, memory);
  }
  std::copy_n(memory.maximum, task.columns, maximum + row);
  std::copy_n(memory.sum, task.columns, sum + row);
}

template <typename destination, typename step_fn>
void absorbed_work::each_tile(const part_of_keys& part, const destination& to, int64_t count,
                              const worker_memory& memory, step_fn&& step) const {
  key_tile tile;
  for (int64_t token = part.begin; token < part.end; token = tile.next) {
    gather_keys(kernels, weights, input.cache, part.of.sequence, token, part.end, to, &tile);
    if (tile.keys == 0) break;
    for (int64_t j = 0; j < count; ++j) {
      memory.steps->seen[j] = tile.seen_from(position(part.of, part.column + j));
    }
    step(tile.padded_keys);
  }
}

void absorbed_work::attend_floats(const part_of_keys& part, const query_block& block,
                                  const worker_memory& memory) const {
  const int64_t width = sizes.latent_width, columns_c = sizes.latent_columns;
  pack_queries(kernels, part.queries, block.columns, width, memory.packed);
  const key_destination to{{memory.rows, columns_c, width},
                           {memory.rows + columns_c, width - columns_c, width}};
  each_tile(part, to, block.columns, memory, [&](int64_t keys) {
    kernels.pair_rows({keys, columns_c, memory.rows, width, memory.values});
    attend(kernels, {keys, memory.rows, width, memory.values, columns_c}, block, sizes.scale,
           memory.steps);
  });
}

void absorbed_work::attend_int8(const part_of_keys& part, const query_block& block,
                                const worker_memory& memory) const {
  const int64_t columns_c = sizes.latent_columns, rope_width = sizes.latent_width - columns_c;
  const integer_queries packed{memory.packed, memory.query_scale,
                               memory.packed + block_columns * columns_c};
  pack_integer_queries(kernels, part.queries, block.columns, columns_c, sizes.latent_width, packed);
  const int64_t stride = columns_c + row_padding;
  uint16_t* const rope = memory.rows + tile_keys * stride;
  const integer_destination to{
      memory.rows, columns_c, stride, memory.key_scale, {rope, rope_width, rope_width}};
  each_tile(part, to, block.columns, memory, [&](int64_t keys) {
    attend_integers(
        kernels,
        {keys, columns_c, memory.rows, stride, memory.key_scale, rope, rope_width, memory.values},
        block, packed, sizes.scale, memory.steps);
  });
}

// out [latent_columns] = the parts' sums in ascending order, over the sum of the weights.
void absorbed_work::combine(const sequence_rows& of, int64_t column, const worker_memory& memory,
                            float* out) const {
  const int64_t first = of.first_partial + column;
  float top = no_maximum, total = 0.0f;
  for (int64_t p = 0; p < of.parts.count; ++p) {
    top = std::max(top, maximum[first + p * columns()]);
  }
  for (int64_t p = 0; p < of.parts.count; ++p) {
    memory.part_weights[p] = attention_exp2(maximum[first + p * columns()] - top);
    total += sum[first + p * columns()] * memory.part_weights[p];
  }
  const float inverse = total == 0.0f ? 0.0f : 1.0f / total;  // 0: it sees nothing
  for (int64_t p = 0; p < of.parts.count; ++p) {
    memory.part_weights[p] *= inverse;
    memory.zeros[p] = 0;
  }
  std::fill_n(out, sizes.latent_columns, 0.0f);
  kernels.weighted_add({of.parts.count, sizes.latent_columns, memory.zeros, memory.part_weights,
                        partial + first * sizes.latent_columns, columns() * sizes.latent_columns,
                        out, sizes.latent_columns});
}

// The output of one head for a slice of queries.
void absorbed_work::project(int64_t task, int worker) const {
  const int64_t h = task % weights.heads, begin = task / weights.heads * task_rows;
  const int64_t rows = std::min(task_rows, token_rows() - begin);
  const worker_memory memory = memory_of(worker);
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t row = begin + i;
    combine(plan.sequences[static_cast<size_t>(row / chunk.tokens)],
            row % chunk.tokens * weights.heads + h, memory,
            memory.latent_rows + i * sizes.latent_columns);
  }
  const int64_t first = worker * task_rows, stride = weights.heads * weights.value;
  prepare_rows(kernels, weights.format, rows, weights.latent, memory.latent_rows,
               sizes.latent_columns, float_type::fp32, prepared, first);
  const packed_matrix uv = head(weights.uv, h, weights.value, weights.latent);
  for (int64_t j = 0; j < weights.value; j += wide_slice) {
    const int64_t n = std::min(wide_slice, padded_n(weights.value) - j);
    multiply(kernels, weights.format, weights.latent, prepared,
             {rows, n, nullptr, first, outputs_from(weights.format, uv, j, weights.latent),
              memory.tile, wide_slice});
    char* out =
        static_cast<char*>(input.out) +
        ((first_row() + begin) * stride + h * weights.value + j) * float_type_size(input.type);
    kernels.round_rows(
        {rows, std::min(n, weights.value - j), memory.tile, wide_slice, out, stride, input.type});
  }
}

template <void (absorbed_work::*step)(int64_t, int) const>
phase phase_of(int64_t tasks, absorbed_work* work) {
  return {tasks,
          [](void* context, int64_t task, int worker) {
            (static_cast<const absorbed_work*>(context)->*step)(task, worker);
          },
          work};
}

void make_plan(const mla_weights& weights, const mla_input& input, const mla_chunk& chunk,
               absorbed_plan* plan) {
  const int64_t columns = chunk.tokens * weights.heads;
  plan->sequences.clear();
  plan->tasks.clear();
  plan->partial_rows = plan->most_parts = 0;
  for (int64_t s = 0; s < chunk.sequences; ++s) {
    const key_parts parts = parts_of(input, chunk.first_sequence + s);
    plan->sequences.push_back({chunk.first_sequence + s, parts, plan->partial_rows});
    plan->partial_rows += parts.count * columns;
    plan->most_parts = std::max(plan->most_parts, parts.count);
    for (int64_t part = 0; part < parts.count; ++part) {
      for (int64_t column = 0; column < columns; column += block_columns) {
        plan->tasks.push_back({s, column, std::min(block_columns, columns - column), part});
      }
    }
  }
}

}  // namespace

void absorbed_forward(const kernel_table& kernels, const mla_weights& weights,
                      const mla_input& input, const mla_chunk& chunk, int threads) {
  const borrowed_scratch scratch;
  const mla_sizes sizes(weights, input);
  make_plan(weights, input, chunk, &scratch->absorbed);
  const absorbed_plan& plan = scratch->absorbed;
  const int64_t token_rows = chunk.sequences * chunk.tokens;
  // A block's last panel of queries is read as a whole.
  const int64_t query_rows = token_rows * weights.heads + panel_outputs;
  absorbed_work work{kernels,
                     weights,
                     input,
                     chunk,
                     sizes,
                     plan,
                     scratch->x.reserve(weights.format, threads * task_rows,
                                        std::max(weights.nope, weights.latent)),
                     nullptr,
                     nullptr,
                     nullptr,
                     nullptr,
                     nullptr,
                     0};
  work.worker_bytes = static_cast<int64_t>(work.memory_of(0).end);
  const auto cut = [&](memory_cutter memory) {
    work.queries = memory.cut<uint16_t>(query_rows * sizes.latent_width);
    work.partial = memory.cut<float>(plan.partial_rows * sizes.latent_columns);
    work.maximum = memory.cut<float>(plan.partial_rows);
    work.sum = memory.cut<float>(plan.partial_rows);
    work.workers = memory.cut<char>(threads * work.worker_bytes);
    return static_cast<int64_t>(memory.end());
  };
  cut(memory_cutter(scratch->attention.reserve(cut(memory_cutter(nullptr)) + cut_alignment)));
  const int64_t slices = divide_up(token_rows, task_rows) * weights.heads;
  const phase phases[] = {
      phase_of<&absorbed_work::absorb>(slices, &work),
      phase_of<&absorbed_work::attend_part>(static_cast<int64_t>(plan.tasks.size()), &work),
      phase_of<&absorbed_work::project>(slices, &work)};
  run_phases(phases, 3, threads);
}

}  // namespace kt
