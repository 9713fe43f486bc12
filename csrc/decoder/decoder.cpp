// The steps of a decoder layer, one after another; those with large weights are jobs of the pool.
#include "decoder.h"

#include <algorithm>
#include <cstring>

#include "../float_types.h"
#include "../mla/scratch_parts.h"
#include "../scratch.h"
#include "../thread_pool.h"

namespace kt {
namespace {

// Arrays of one chunk's rows, cut from scratch memory.
struct row_memory {
  char *normed, *compressed_q, *normed_q, *q, *kv, *latent, *rope, *attended, *projected, *hidden;
  char *mlp, *routed;
  float* logits;
  int32_t* index;
  float* weight;
  int8_t* quantised;
  int32_t *sums, *lengths;
  uintptr_t end;

  row_memory(memory_cutter memory, const decoder_weights& weights, int64_t rows) {
    const mla_weights& attention = *weights.attention;
    const auto array = [&](int64_t width) {
      return memory.cut<char>(rows * width * float_type_size(weights.type));
    };
    const int64_t lora = weights.q_a ? weights.q_a->out_features : 0;
    normed = array(weights.hidden_size);
    compressed_q = array(lora);
    normed_q = array(lora);
    q = array(attention.heads * (attention.nope + attention.rope));
    kv = array(attention.latent + attention.rope);
    latent = array(attention.latent);
    rope = array(attention.rope);
    attended = array(attention.heads * attention.value);
    projected = array(weights.hidden_size);
    hidden = array(weights.hidden_size);
    mlp = array(weights.hidden_size);
    routed = array(weights.hidden_size);
    const router_rule& router = weights.router;
    const int64_t top_k = std::max<int64_t>(router.top_k, 1);
    logits = memory.cut<float>(rows * logits_stride(router));
    index = memory.cut<int32_t>(rows * top_k);
    weight = memory.cut<float>(rows * top_k);
    quantised = memory.cut<int8_t>(latent_group);
    sums = memory.cut<int32_t>(1);
    lengths = memory.cut<int32_t>(rows);
    end = memory.end();
  }

  static int64_t logits_stride(const router_rule& router) {
    return 2 * router.experts + router.groups;
  }
};

struct layer_call {
  const kernel_table& kernels;
  const decoder_weights& weights;
  const decoder_input& input;
  const decoder_chunk& chunk;
  int threads;
  row_memory memory;

  int64_t rows() const { return chunk.sequences * chunk.tokens; }
  int64_t bytes(int64_t elements) const { return elements * float_type_size(weights.type); }

  // Of the chunk's rows, those that have queries and an MLP: all, or each sequence's last token.
  int64_t active() const {
    if (!input.last_only) return rows();
    return chunk.first_token + chunk.tokens < input.tokens ? 0 : chunk.sequences;
  }
  int64_t active_row(int64_t i) const { return input.last_only ? (i + 1) * chunk.tokens - 1 : i; }

  // The chunk's first row in an array of the whole call.
  int64_t first_row() const { return chunk.first_sequence * input.tokens + chunk.first_token; }
  const char* x() const {
    return static_cast<const char*>(input.x) + bytes(first_row() * weights.hidden_size);
  }
  char* out() const {
    return static_cast<char*>(input.out) + bytes(first_row() * weights.hidden_size);
  }
  int64_t q_width() const {
    const mla_weights& of = *weights.attention;
    return of.heads * (of.nope + of.rope);
  }
  char* given_q() const { return static_cast<char*>(input.q) + bytes(first_row() * q_width()); }
  char* q() const { return input.q && !input.last_only ? given_q() : memory.q; }

  void norm(const norm_weight& by, int64_t count, int64_t n, const void* from, int64_t stride,
            void* to) const {
    kernels.rms_norm({count, n, from, stride, by.weight, by.eps, to, weights.type});
  }
  void project(const linear_weights& by, int64_t count, const void* from, void* to) const {
    linear_forward(kernels, by, {from, to, weights.type}, 0, count, threads);
  }
  void add(int64_t count, const void* a, const void* b, void* to) const {
    kernels.add_rows({count * weights.hidden_size, a, b, to, weights.type});
  }
  // Copies the active ones of the chunk's rows to the front; `to` may be `from`.
  void gather(const char* from, int64_t width, char* to) const {
    for (int64_t i = 0; i < active(); ++i) {
      std::memmove(to + bytes(i * width), from + bytes(active_row(i) * width),
                   static_cast<size_t>(bytes(width)));
    }
  }

  int64_t angle(int64_t row) const;
  void latents() const;
  void queries() const;
  void cache(int64_t row) const;
  void cache_int8(const char* latent, int64_t slot) const;
  void attend() const;
  void mlp() const;
  void route(int64_t count) const;
  void experts(const experts_weights& of, int64_t count, int64_t top_k, void* to) const;
};

// Which angles are a row's.
int64_t layer_call::angle(int64_t row) const {
  const int64_t in_call = first_row() + row;
  return input.shared_angles ? in_call % input.tokens : in_call;
}

// Into the cache, for all rows.
void layer_call::latents() const {
  const mla_weights& of = *weights.attention;
  const int64_t hidden = weights.hidden_size, width = of.latent + of.rope;
  norm(weights.input_norm, rows(), hidden, x(), hidden, memory.normed);
  project(*weights.kv_a, rows(), memory.normed, memory.kv);
  norm(weights.latent_norm, rows(), of.latent, memory.kv, width, memory.latent);
  for (int64_t row = 0; row < rows(); ++row) {
    rotate({weights.rotary, of.rope, 1, memory.kv + bytes(row * width + of.latent), width,
            memory.rope + bytes(row * of.rope), of.rope, weights.type, input.angles, angle(row)});
    cache(row);
  }
}

// Of the active rows, after `latents`, which has normed all.
void layer_call::queries() const {
  const mla_weights& of = *weights.attention;
  const int64_t count = active();
  if (input.last_only) gather(memory.normed, weights.hidden_size, memory.normed);
  const char* into_q = memory.normed;
  if (weights.q_a) {
    const int64_t lora = weights.q_a->out_features;
    project(*weights.q_a, count, memory.normed, memory.compressed_q);
    norm(weights.query_norm, count, lora, memory.compressed_q, lora, memory.normed_q);
    into_q = memory.normed_q;
  }
  project(*weights.q_b, count, into_q, q());
  const int64_t width = of.nope + of.rope;
  for (int64_t i = 0; i < count; ++i) {
    char* const q_rope = q() + bytes(i * of.heads * width + of.nope);
    rotate({weights.rotary, of.rope, of.heads, q_rope, width, q_rope, width, weights.type,
            input.angles, angle(active_row(i))});
  }
}

// Writes n values of a type to where another is kept; both are bf16 or fp32.
void convert(const void* from, float_type type, int64_t n, void* to, float_type kept, int64_t at) {
  if (type == kept) {
    const size_t size = static_cast<size_t>(float_type_size(type));
    std::memcpy(static_cast<char*>(to) + static_cast<size_t>(at) * size, from,
                static_cast<size_t>(n) * size);
    return;
  }
  for (int64_t i = 0; i < n; ++i) store_float(to, kept, at + i, load_float(from, type, i));
}

// The caller owns what latent_cache points to, and attention alone promises not to write there.
void layer_call::cache(int64_t row) const {
  const latent_cache& to = input.cache;
  const int64_t sequence = chunk.first_sequence + row / chunk.tokens;
  const int64_t token =
      to.lengths[sequence] - input.tokens + chunk.first_token + row % chunk.tokens;
  const int64_t page = to.block_table[sequence * to.max_pages + token / to.page_tokens];
  const int64_t slot = page * to.page_tokens + token % to.page_tokens;
  const int64_t n = weights.attention->latent, r = weights.attention->rope;
  const char* latent = memory.latent + bytes(row * n);
  if (to.type == latent_type::int8) {
    cache_int8(latent, slot);
  } else {
    const float_type kept = to.type == latent_type::bf16 ? float_type::bf16 : float_type::fp32;
    convert(latent, weights.type, n, const_cast<void*>(to.latent), kept, slot * n);
  }
  convert(memory.rope + bytes(row * r), weights.type, r, const_cast<void*>(to.rope), to.rope_type,
          slot * r);
}

// Group by group: the last may be shorter than what quantize_rows pads it to.
void layer_call::cache_int8(const char* latent, int64_t slot) const {
  const latent_cache& to = input.cache;
  const int64_t n = weights.attention->latent;
  int8_t* const q = static_cast<int8_t*>(const_cast<void*>(to.latent)) + slot * n;
  float* const scale = const_cast<float*>(to.scale) + slot * latent_groups(n);
  for (int64_t group = 0; group < latent_groups(n); ++group) {
    const int64_t begin = group * latent_group, count = std::min(n - begin, latent_group);
    kernels.quantize_rows({1, count, latent_group, latent + bytes(begin), count, weights.type,
                           memory.quantised, scale + group, memory.sums});
    std::memcpy(q + begin, memory.quantised, static_cast<size_t>(count));
  }
}

void layer_call::attend() const {
  latent_cache cache = input.cache;
  cache.block_table += chunk.first_sequence * cache.max_pages;
  if (cache.valid) cache.valid += chunk.first_sequence * cache.valid_stride;
  const int64_t after = input.tokens - chunk.first_token - chunk.tokens;
  for (int64_t b = 0; b < chunk.sequences; ++b) {
    memory.lengths[b] = static_cast<int32_t>(input.cache.lengths[chunk.first_sequence + b] - after);
  }
  cache.lengths = memory.lengths;
  const int64_t tokens = active() / chunk.sequences;
  const mla_input attention{chunk.sequences, tokens,          q(),  memory.attended,
                            weights.type,    weights.scaling, cache};
  int64_t sequence = 0, token = 0;
  while (sequence < chunk.sequences) {
    const mla_chunk part = mla_chunk_at(*weights.attention, attention, {}, sequence, token);
    mla_forward(kernels, *weights.attention, attention, part, threads);
    token = part.first_token + part.tokens;
    if (token < tokens) continue;
    token = 0;
    sequence += part.sequences;
  }
  project(*weights.o, active(), memory.attended, memory.projected);
  gather(x(), weights.hidden_size, memory.hidden);
  add(active(), memory.hidden, memory.projected, memory.hidden);
}

// Chooses the experts of the first `count` rows of `normed`.
void layer_call::route(int64_t count) const {
  const auto run = [](void* context, int64_t task, int) {
    const layer_call& self = **static_cast<const layer_call* const*>(context);
    const decoder_weights& of = self.weights;
    const router_rule& rule = of.router;
    const int64_t stride = row_memory::logits_stride(rule);
    float* const logits = self.memory.logits + task * stride;
    const char* x = self.memory.normed + self.bytes(task * of.hidden_size);
    self.kernels.router_logits(
        {1, rule.experts, of.hidden_size, x, of.router_weight, of.type, logits, stride});
    choose_experts(rule, logits, self.memory.index + task * rule.top_k,
                   self.memory.weight + task * rule.top_k);
  };
  const layer_call* self = this;
  const phase rows{count, run, &self};
  run_phases(&rows, 1, count > 1 ? threads : 1);
}

// Of the first rows of `normed`, as index and weight say.
void layer_call::experts(const experts_weights& of, int64_t count, int64_t top_k, void* to) const {
  const experts_input call{
      {count, top_k, memory.index, index_type::int32, memory.weight, float_type::fp32},
      memory.normed,
      to,
      weights.type};
  const int64_t step = max_chunk_tokens(top_k, count);
  for (int64_t begin = 0; begin < count; begin += step) {
    experts_forward(kernels, of, call, begin, std::min(step, count - begin), threads);
  }
}

void layer_call::mlp() const {
  const int64_t n = weights.hidden_size, count = active();
  norm(weights.mlp_norm, count, n, memory.hidden, n, memory.normed);
  if (weights.routed) {
    route(count);
    const int64_t top_k = weights.router.top_k;
    if (input.chosen) {
      const int64_t row = input.last_only ? chunk.first_sequence : first_row();
      std::memcpy(input.chosen + row * top_k, memory.index,
                  static_cast<size_t>(count * top_k) * sizeof(int32_t));
    }
    experts(*weights.routed, count, top_k, memory.routed);
  }
  std::fill_n(memory.index, count, 0);
  std::fill_n(memory.weight, count, 1.0f);
  experts(*weights.mlp, count, 1, memory.mlp);
  if (weights.routed) add(count, memory.routed, memory.mlp, memory.mlp);
  if (!input.last_only) {
    add(count, memory.hidden, memory.mlp, out());
    return;
  }
  for (int64_t i = 0; i < count; ++i) {
    add(1, memory.hidden + bytes(i * n), memory.mlp + bytes(i * n),
        out() + bytes(active_row(i) * n));
  }
}

}  // namespace

decoder_chunk decoder_chunk_at(const decoder_input& input, int64_t sequence, int64_t token,
                               int64_t most) {
  if (sequence == 0 && token == 0 && input.batch * input.tokens <= most) {
    return {0, input.batch, 0, input.tokens};
  }
  return {sequence, 1, token, std::min(input.tokens - token, most)};
}

void decoder_forward(const kernel_table& kernels, const decoder_weights& weights,
                     const decoder_input& input, const decoder_chunk& chunk, decoder_part part,
                     int threads) {
  const borrowed_scratch scratch(scratch_of::decoder_layer);
  const int64_t rows = chunk.sequences * chunk.tokens;
  const row_memory counted(memory_cutter(nullptr), weights, rows);
  const auto size = static_cast<int64_t>(counted.end + cut_alignment);
  const layer_call call{kernels, weights,
                        input,   chunk,
                        threads, {memory_cutter(scratch->decoder.reserve(size)), weights, rows}};
  if (part != decoder_part::finish) call.latents();
  if (part != decoder_part::project && input.last_only) {
    std::memcpy(call.out(), call.x(), static_cast<size_t>(call.bytes(rows * weights.hidden_size)));
  }
  if (call.active() == 0) return;
  if (part != decoder_part::finish) {
    call.queries();
  } else if (input.last_only) {
    call.gather(call.given_q(), call.q_width(), call.q());
  }
  if (part == decoder_part::project) return;
  call.attend();
  call.mlp();
}

}  // namespace kt
