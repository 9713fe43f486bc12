// The expanded form: a task is one head and some of the chunk's queries; tile by tile it expands
// keys and values and goes through its queries block by block.
#include <algorithm>
#include <cstring>

#include "../bf16_gemm/bf16_gemm.h"
#include "../float_types.h"
#include "../scratch.h"
#include "../slices.h"
#include "../thread_pool.h"
#include "../weights/dequantise.h"
#include "forms.h"
#include "scratch_parts.h"

namespace kt {
namespace {

struct expanded_sizes : mla_sizes {
  int64_t key_columns, value_columns;  // Dn and Dv, to panels
  int64_t query_width;                 // of a row with both parts

  expanded_sizes(const mla_weights& weights, const mla_input& input)
      : mla_sizes(weights, input),
        key_columns(round_up(weights.nope, bf16_gemm_n_multiple)),
        value_columns(round_up(weights.value, bf16_gemm_n_multiple)),
        query_width(round_up(key_columns + weights.rope, bf16_gemm_k_multiple)) {}
};

// One worker's; `queries` is what it has room for, a multiple of block_columns.
struct worker_memory {
  attend_scratch* steps;
  uint16_t *w_rows, *uk, *uv;  // a head's weights: in rows, and packed
  uint16_t* latents;           // a tile's rows as the cache has them
  float* expanded;             // fp32 of a product
  uint16_t *keys, *value_rows, *values;
  uint16_t *query_rows, *packed;  // one panel, and all
  float *maximum, *sum, *acc;
  uintptr_t end;

  worker_memory(memory_cutter memory, const expanded_sizes& sizes, int64_t queries)
      : steps(memory.cut<attend_scratch>(1)),
        w_rows(memory.cut<uint16_t>(std::max(sizes.latent_columns * sizes.key_columns,
                                             sizes.value_columns * sizes.latent_columns))),
        uk(memory.cut<uint16_t>(sizes.key_columns * sizes.latent_columns)),
        uv(memory.cut<uint16_t>(sizes.value_columns * sizes.latent_columns)),
        latents(memory.cut<uint16_t>(tile_keys * sizes.latent_columns)),
        expanded(memory.cut<float>(tile_keys * wide_slice)),
        keys(memory.cut<uint16_t>(tile_keys * sizes.query_width)),
        value_rows(memory.cut<uint16_t>(tile_keys * sizes.value_columns)),
        values(memory.cut<uint16_t>(tile_keys * sizes.value_columns)),
        query_rows(memory.cut<uint16_t>(panel_outputs * sizes.query_width)),
        packed(memory.cut<uint16_t>(queries * sizes.query_width)),
        maximum(memory.cut<float>(queries)),
        sum(memory.cut<float>(queries)),
        acc(memory.cut<float>(queries * sizes.value_columns)),
        end(memory.end()) {}
};

struct expanded_work {
  const kernel_table& kernels;
  const mla_weights& weights;
  const mla_input& input;
  const mla_chunk& chunk;
  const expanded_sizes& sizes;
  int64_t queries_per_task;
  char* workers;
  int64_t worker_bytes;

  worker_memory memory_of(int worker) const {
    return {memory_cutter(workers + worker * worker_bytes), sizes, queries_per_task};
  }
  int64_t first_row() const { return chunk.first_sequence * input.tokens + chunk.first_token; }

  void run(int64_t task, int worker) const;
  void load_weights(int64_t h, const worker_memory& memory) const;
  void load_queries(int64_t h, int64_t first, int64_t count, const worker_memory& memory) const;
  void expand(const key_tile& tile, const worker_memory& memory, const uint16_t* packed, int64_t n,
              uint16_t* out, int64_t out_stride) const;
  void store(int64_t h, int64_t first, int64_t count, const worker_memory& memory) const;
};

// W_UK and W_UV of a head as products of latents take them, in bf16.
void expanded_work::load_weights(int64_t h, const worker_memory& memory) const {
  const weight_format format = weights.format;
  const int64_t c = weights.latent, columns = sizes.latent_columns;
  const auto head = [&](packed_matrix all, int64_t n, int64_t k) {
    return packed_matrix{all.packed + h * packed_bytes(format, n, k),
                         all.scale + h * scale_count(format, n, k) * scale_size(format)};
  };
  std::fill_n(memory.w_rows, columns * sizes.key_columns, uint16_t{0});
  dequantise(format, head(weights.uk, c, weights.nope), c, weights.nope, memory.w_rows,
             sizes.key_columns);
  kernels.pair_rows({columns, sizes.key_columns, memory.w_rows, sizes.key_columns, memory.uk});
  std::fill_n(memory.w_rows, sizes.value_columns * columns, uint16_t{0});
  dequantise(format, head(weights.uv, weights.value, c), weights.value, c, memory.w_rows, columns);
  pack_queries(kernels, memory.w_rows, sizes.value_columns, columns, memory.uv);
}

// Queries [first, first + count) of the chunk, packed; the last panel ends in zeros.
void expanded_work::load_queries(int64_t h, int64_t first, int64_t count,
                                 const worker_memory& memory) const {
  const int64_t stride = weights.heads * sizes.query, size = float_type_size(input.type);
  const char* q =
      static_cast<const char*>(input.q) + ((first_row() + first) * stride + h * sizes.query) * size;
  for (int64_t i = 0; i < count; i += panel_outputs, q += panel_outputs * stride * size) {
    const int64_t rows = std::min(panel_outputs, count - i);
    std::fill_n(memory.query_rows, panel_outputs * sizes.query_width, uint16_t{0});
    round_to_bf16(kernels, rows, weights.nope, q, stride, input.type, memory.query_rows,
                  sizes.query_width);
    round_to_bf16(kernels, rows, weights.rope, q + weights.nope * size, stride, input.type,
                  memory.query_rows + sizes.key_columns, sizes.query_width);
    pack_queries(kernels, memory.query_rows, rows, sizes.query_width,
                 memory.packed + i * sizes.query_width);
  }
}

// A tile's latents times n outputs of a head's weights, in bf16.
void expanded_work::expand(const key_tile& tile, const worker_memory& memory,
                           const uint16_t* packed, int64_t n, uint16_t* out,
                           int64_t out_stride) const {
  for (int64_t j = 0; j < n; j += wide_slice) {
    const int64_t columns = std::min(wide_slice, n - j);
    kernels.bf16_gemm({tile.padded_keys, columns, sizes.latent_columns, nullptr, memory.latents,
                       nullptr, nullptr, packed + j * sizes.latent_columns, nullptr, 0,
                       memory.expanded, wide_slice});
    kernels.round_rows({tile.padded_keys, columns, memory.expanded, wide_slice, out + j, out_stride,
                        float_type::bf16});
  }
}

void expanded_work::run(int64_t task, int worker) const {
  const int64_t h = task % weights.heads, first = task / weights.heads * queries_per_task;
  const int64_t count = std::min(queries_per_task, chunk.tokens - first);
  const int64_t sequence = chunk.first_sequence, width = sizes.query_width;
  const worker_memory memory = memory_of(worker);
  load_weights(h, memory);
  load_queries(h, first, count, memory);
  const auto position = [&](int64_t query) {
    return query_position(input, sequence, chunk.first_token + first + query);
  };
  const auto block_at = [&](int64_t begin) {
    return query_block{std::min(block_columns, count - begin),
                       memory.packed + begin * width,
                       memory.maximum + begin,
                       memory.sum + begin,
                       memory.acc + begin * sizes.value_columns,
                       sizes.value_columns};
  };
  for (int64_t begin = 0; begin < count; begin += block_columns) begin_block(block_at(begin));
  const key_destination rows{{memory.latents, sizes.latent_columns, sizes.latent_columns},
                             {memory.keys + sizes.key_columns, width - sizes.key_columns, width}};
  const int64_t end = position(count - 1) + 1;
  key_tile tile;
  for (int64_t token = 0; token < end; token = tile.next) {
    gather_keys(kernels, weights, input.cache, sequence, token, end, rows, &tile);
    if (tile.keys == 0) break;
    expand(tile, memory, memory.uk, sizes.key_columns, memory.keys, width);
    expand(tile, memory, memory.uv, sizes.value_columns, memory.value_rows, sizes.value_columns);
    kernels.pair_rows({tile.padded_keys, sizes.value_columns, memory.value_rows,
                       sizes.value_columns, memory.values});
    for (int64_t begin = 0; begin < count; begin += block_columns) {
      const query_block block = block_at(begin);
      if (position(begin + block.columns - 1) < tile.positions[0]) continue;
      for (int64_t j = 0; j < block.columns; ++j) {
        memory.steps->seen[j] = tile.seen_from(position(begin + j));
      }
      attend(kernels, {tile.padded_keys, memory.keys, width, memory.values, sizes.value_columns},
             block, sizes.scale, memory.steps);
    }
  }
  store(h, first, count, memory);
}

// The sums of values over those of weights, to the output.
void expanded_work::store(int64_t h, int64_t first, int64_t count,
                          const worker_memory& memory) const {
  for (int64_t i = 0; i < count; ++i) {
    const float inverse = memory.sum[i] == 0.0f ? 0.0f : 1.0f / memory.sum[i];  // 0: sees nothing
    float* acc = memory.acc + i * sizes.value_columns;
    for (int64_t j = 0; j < weights.value; ++j) acc[j] *= inverse;
  }
  const int64_t stride = weights.heads * weights.value;
  char* out = static_cast<char*>(input.out) +
              ((first_row() + first) * stride + h * weights.value) * float_type_size(input.type);
  kernels.round_rows(
      {count, weights.value, memory.acc, sizes.value_columns, out, stride, input.type});
}

}  // namespace

void expanded_forward(const kernel_table& kernels, const mla_weights& weights,
                      const mla_input& input, const mla_chunk& chunk, int threads) {
  const borrowed_scratch scratch;
  const expanded_sizes sizes(weights, input);
  // Each task expands the keys again: only where there are too few heads for the threads does one
  // take less than all queries.
  const int64_t shares = std::max<int64_t>(1, threads / weights.heads);
  const int64_t queries = round_up(divide_up(chunk.tokens, shares), block_columns);
  expanded_work work{kernels, weights, input, chunk, sizes, queries, nullptr, 0};
  work.worker_bytes = static_cast<int64_t>(work.memory_of(0).end);
  work.workers = memory_cutter(scratch->attention.reserve(threads * work.worker_bytes +
                                                          int64_t{cut_alignment}))
                     .cut<char>(0);
  const phase all{divide_up(chunk.tokens, queries) * weights.heads,
                  [](void* context, int64_t task, int worker) {
                    static_cast<const expanded_work*>(context)->run(task, worker);
                  },
                  &work};
  run_phases(&all, 1, threads);
}

}  // namespace kt
