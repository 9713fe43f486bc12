// Cuts a call into chunks, and what both forms share.
#include "mla.h"

#include <algorithm>
#include <cstring>

#include "../bf16_gemm/bf16_gemm.h"
#include "../float_types.h"
#include "../slices.h"
#include "forms.h"

namespace kt {
namespace {

constexpr double log2_e = 1.4426950408889634;
// Rows of C sums in fp32 that a chunk of the absorbed form keeps: 8 MiB at C = 512.
constexpr int64_t max_partial_rows = 4096;
// Queries of a chunk of the expanded form: keys are expanded once for all of them.
constexpr int64_t max_expanded_queries = 1024;
// Unpacking a head's weights takes about as long as expanding so many keys (docs/log.md).
constexpr int64_t weights_as_keys = 48;
constexpr int64_t max_key_parts = 32;

}  // namespace

mla_sizes::mla_sizes(const mla_weights& weights, const mla_input& input)
    : latent_columns(padded_n(weights.latent)),
      latent_width(round_up(latent_columns + weights.rope, bf16_gemm_k_multiple)),
      query(weights.nope + weights.rope),
      scale(static_cast<float>(static_cast<double>(input.scaling) * log2_e)) {}

void round_to_bf16(const kernel_table& kernels, int64_t count, int64_t n, const void* x,
                   int64_t x_stride, float_type type, uint16_t* out, int64_t out_stride) {
  if (type == float_type::fp32) {
    const float* from = static_cast<const float*>(x);
    kernels.round_rows({count, n, from, x_stride, out, out_stride, float_type::bf16});
    return;
  }
  const uint16_t* from = static_cast<const uint16_t*>(x);
  for (int64_t i = 0; i < count; ++i) {
    std::memcpy(out + i * out_stride, from + i * x_stride, static_cast<size_t>(n) * sizeof *from);
  }
}

key_parts parts_of(const mla_input& input, int64_t sequence) {
  const int64_t length = input.cache.lengths[sequence];
  const int64_t most = std::max<int64_t>(1, max_key_parts / input.tokens);
  const int64_t keys = round_up(divide_up(length, most), tile_keys);
  return {divide_up(length, keys), keys};
}

mla_form faster_form(const mla_weights& weights, const mla_input& input, int64_t sequence) {
  const int64_t tokens = input.tokens, length = input.cache.lengths[sequence];
  const int64_t pairs = tokens * length - tokens * (tokens - 1) / 2;
  const int64_t both_ways = weights.latent * (weights.nope + weights.value);
  const int64_t absorbed = pairs * (2 * weights.latent + weights.rope) + tokens * both_ways;
  const int64_t expanded = pairs * (weights.nope + weights.rope + weights.value) +
                           (length + weights_as_keys) * both_ways;
  return absorbed <= expanded ? mla_form::absorbed : mla_form::expanded;
}

mla_chunk mla_chunk_at(const mla_weights& weights, const mla_input& input,
                       std::optional<mla_form> wanted, int64_t sequence, int64_t token) {
  const auto form_of = [&](int64_t of) {
    return wanted ? *wanted : faster_form(weights, input, of);
  };
  const mla_form form = form_of(sequence);
  const int64_t left = input.tokens - token;
  if (form == mla_form::expanded) {
    // Equal shares: a chunk of few queries would expand all keys for them.
    const int64_t shares = divide_up(input.tokens, max_expanded_queries);
    const int64_t share = round_up(divide_up(input.tokens, shares), block_columns);
    return {form, sequence, 1, token, std::min(left, share)};
  }
  const auto rows = [&](int64_t of) { return parts_of(input, of).count * weights.heads; };
  if (token > 0 || rows(sequence) * input.tokens > max_partial_rows) {
    const int64_t fit = std::max<int64_t>(1, max_partial_rows / rows(sequence));
    return {form, sequence, 1, token, std::min(left, fit)};
  }
  int64_t end = sequence, total = 0;
  while (end < input.batch && form_of(end) == form &&
         total + rows(end) * input.tokens <= max_partial_rows) {
    total += rows(end++) * input.tokens;
  }
  return {form, sequence, end - sequence, 0, input.tokens};
}

void mla_forward(const kernel_table& kernels, const mla_weights& weights, const mla_input& input,
                 const mla_chunk& chunk, int threads) {
  if (chunk.form == mla_form::absorbed) {
    absorbed_forward(kernels, weights, input, chunk, threads);
  } else {
    expanded_forward(kernels, weights, input, chunk, threads);
  }
}

}  // namespace kt
