// Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1) over a cache of latents,
// causal, for a batch of sequences of any lengths. For head h of query t of a sequence:
//
//   score_i = scaling * (q_nope . (W_UK c_i) + q_rope . k_rope_i)   keys i that t may see
//   out = sum_i softmax(score)_i W_UV c_i
//
// where c_i is what the cache keeps of token i. There are two forms of it, equal but for rounding:
//
//   absorbed:  q_c = W_UK^T q_nope;  score_i = scaling * (q_c . c_i + q_rope . k_rope_i)
//              out = W_UV (sum_i softmax(score)_i c_i)
//   expanded:  k_i = W_UK c_i, v_i = W_UV c_i, for each tile of keys while it is in the cache
//
// The absorbed form reads a latent once for all heads and does 2 (2 C + R) operations per query,
// key and head; the expanded one 2 (Dn + R + Dv), and 2 C (Dn + Dv) per key and head, whatever the
// number of queries. So few queries are absorbed and many expanded: faster_form counts.
//
// Products are of bf16 (bf16_gemm.h), but for q_c and out of the absorbed form, which are those of
// the weights' format (weights/rows.h); latents that are not bf16 are rounded to it, and so are
// q_c, k, v and, in the expanded form, the weights. Int8 latents of the absorbed form are taken as
// they are, q_c and softmax(score) in 16 bits (int16_gemm.h), which is exact but for the rounding
// of those two, unless bf16 has tiles. The rest is fp32 (attention.h). A query's output depends
// neither on the other sequences nor on the number of threads; a query that sees nothing gives
// zeros.
#pragma once

#include <cstdint>
#include <optional>

#include "../kernels.h"
#include "../weights/rows.h"

namespace kt {

// C, R, Dn and Dv of the formulas: sizes of a latent, of the part with positions, of q_nope and of
// a value. Owned by the caller.
struct mla_weights {
  weight_format format;
  int64_t heads;
  int64_t latent, rope, nope, value;
  packed_matrix uk;  // per head n = C, k = Dn: the transposed W_UK
  packed_matrix uv;  // per head n = Dv, k = C
};

enum class latent_type : uint8_t { bf16, fp32, int8 };

// Neighbouring latents that share a scale where they are int8, as in DeepSeek's own fp8 caches, so
// that an outlier costs its group alone. The last group of a token may be shorter.
constexpr int64_t latent_group = 128;
constexpr int64_t latent_groups(int64_t latent) {
  return round_up(latent, latent_group) / latent_group;
}

// The cache of one layer in pages of tokens: token i of sequence b is row i % page_tokens of page
// block_table[b][i / page_tokens].
struct latent_cache {
  int64_t page_tokens;
  const void* latent;  // [pages][page_tokens][C]
  latent_type type;
  const float* scale;  // [pages][page_tokens][latent_groups(C)], where latents are int8
  const void* rope;    // [pages][page_tokens][R]
  float_type rope_type;
  const int32_t* block_table;  // [batch][max_pages]
  int64_t max_pages;
  const int32_t* lengths;  // [batch] tokens in the cache, those of the queries included
  const uint8_t* valid;    // [batch][valid_stride], 0 where a token is padding; or nullptr
  int64_t valid_stride;
};

struct mla_input {
  int64_t batch;
  int64_t tokens;   // queries per sequence: the last of its tokens
  const void* q;    // [batch][tokens][heads][Dn + R]
  void* out;        // [batch][tokens][heads][Dv]
  float_type type;  // of both: bf16 or fp32
  float scaling;
  latent_cache cache;
};

enum class mla_form : uint8_t { absorbed, expanded };

// The form that takes less time for all queries of a sequence.
mla_form faster_form(const mla_weights& weights, const mla_input& input, int64_t sequence);

// What one call computes: some queries of some sequences. Where there are several sequences, all
// queries of each.
struct mla_chunk {
  mla_form form;
  int64_t first_sequence, sequences;
  int64_t first_token, tokens;
};

// The chunk that begins at a sequence and one of its queries: as much as the scratch memory, whose
// size does not depend on the cache's, has room for. In the form asked for, or the faster one.
mla_chunk mla_chunk_at(const mla_weights& weights, const mla_input& input,
                       std::optional<mla_form> wanted, int64_t sequence, int64_t token);

void mla_forward(const kernel_table& kernels, const mla_weights& weights, const mla_input& input,
                 const mla_chunk& chunk, int threads);

}  // namespace kt
