// A decoder layer of DeepSeek-V2 and V3 as one call:
//
//   u = norm(x)                           (norm/norm.h)
//   q = W_q u, or W_qb norm(W_qa u)       (linear/linear.h)
//   [c, k_rope] = W_kva u;  c = norm(c)
//   q_rope and k_rope turned              (rotary/rotary.h)
//   c and k_rope into the cache, in its type
//   h = x + W_o attention(q, cache)       (mla/mla.h)
//   v = norm(h)
//   y = h + mlp(v), or h + (routed(v) + shared(v))    (router/router.h, experts/experts.h)
//
// A dense MLP, like shared experts, is one expert of weight 1: gate, up and their product stay in
// fp32. Whatever else passes from one step to the next is rounded to the type of x, bf16 or fp32,
// as between the modules of transformers.
#pragma once

#include <cstdint>

#include "../experts/experts.h"
#include "../kernels.h"
#include "../linear/linear.h"
#include "../mla/mla.h"
#include "../rotary/rotary.h"
#include "../router/router.h"

namespace kt {

struct norm_weight {
  const void* weight;
  float eps;
};

// Owned by the caller.
struct decoder_weights {
  float_type type;  // of norms, router and activations
  int64_t hidden_size;
  norm_weight input_norm, query_norm, latent_norm, mlp_norm;
  const linear_weights* q_a;  // or nullptr: q_b takes the hidden state itself
  const linear_weights* q_b;
  const linear_weights* kv_a;
  const linear_weights* o;
  const mla_weights* attention;
  float scaling;
  rotary_form rotary;
  const experts_weights* mlp;     // one: the dense MLP or the shared experts
  const experts_weights* routed;  // nullptr in a dense layer
  router_rule router;
  const void* router_weight;
};

struct decoder_input {
  int64_t batch, tokens;
  const void* x;  // [batch][tokens][hidden_size]
  void* out;      // likewise; must not overlap x
  rotary_angles angles;
  bool shared_angles;  // tokens of all sequences have those of the first
  latent_cache cache;  // where the new tokens are the last of each sequence
  int32_t* chosen;     // [batch][tokens][top_k] experts, or nullptr
  bool last_only;      // of each sequence the last token alone has an output; of others x is it
  void* q;             // [batch][tokens][heads][Dn + R], or nullptr: kept in scratch memory
};

enum class decoder_part : uint8_t { project, finish, all };  // before, after the cache; both

// What one call computes: all tokens of all sequences, or some tokens of one.
struct decoder_chunk {
  int64_t first_sequence, sequences;
  int64_t first_token, tokens;
};

// The chunk that begins at a sequence and a token, of at most `most` tokens.
decoder_chunk decoder_chunk_at(const decoder_input& input, int64_t sequence, int64_t token,
                               int64_t most);

// `project` and `finish` need input.q: one writes it and the cache, the other reads both.
void decoder_forward(const kernel_table& kernels, const decoder_weights& weights,
                     const decoder_input& input, const decoder_chunk& chunk, decoder_part part,
                     int threads);

}  // namespace kt
