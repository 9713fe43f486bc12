// The router of a mixture-of-experts layer: which experts a token gets, and with which weights.
//
//   router_logits:  logit_e = sum_i x_i * weight_e_i
//
// in fp32, nothing fused, in eight lanes, i in lane i % 8, that end as
// ((0 + 4) + (2 + 6)) + ((1 + 5) + (3 + 7)).
//
// choose_experts, DeepSeek-V3 (arXiv 2412.19437, section 2.1.2): s = sigmoid(logit); experts are
// chosen by s + bias: first the best groups, by the sum of their two best, then the best experts of
// those; their weights are s, over the sum of s of the chosen + 1e-20 where `normalise`, times
// `scaling`. DeepSeek-V2: s = softmax(logits), no bias; a group is as good as its best expert, and
// experts outside of the best groups count as 0; weights are s (so counted) times `scaling`.
// Of equals the first is chosen; a NaN is larger than all else.
#pragma once

#include <cstdint>

#include "../quantize/quantize.h"

namespace kt {

struct router_logits_args {
  int64_t rows;
  int64_t experts;
  int64_t n;
  const void* x;       // [rows][n]
  const void* weight;  // [experts][n]
  float_type type;     // of both: bf16 or fp32
  float* logits;       // [rows][logits_stride]
  int64_t logits_stride;
};

using router_logits_fn = void(const router_logits_args& args);

enum class scoring : uint8_t { sigmoid, softmax };

struct router_rule {
  scoring kind;
  int64_t experts;
  int64_t top_k;
  int64_t groups, top_groups;  // equal: every expert may be chosen
  const float* bias;           // [experts], of sigmoid
  bool normalise;
  float scaling;
};

// One token. `logits` is overwritten; behind it lies working memory for experts + groups values.
void choose_experts(const router_rule& rule, float* logits, int32_t* index, float* weight);

}  // namespace kt
