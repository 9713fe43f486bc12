// A counting sort of (token, slot) pairs by expert.
#include "routing.h"

#include <algorithm>

#include "../float_types.h"

namespace kt {

int64_t expert_at(const routing_input& input, int64_t position) {
  return input.index_kind == index_type::int64 ? static_cast<const int64_t*>(input.index)[position]
                                               : static_cast<const int32_t*>(input.index)[position];
}

int64_t first_bad_index(const routing_input& input, int64_t num_experts) {
  for (int64_t i = 0; i < input.tokens * input.top_k; ++i) {
    const int64_t expert = expert_at(input, i);
    if (expert < 0 || expert > num_experts) return i;
  }
  return -1;
}

void sort_by_expert(const routing_input& input, int64_t begin, int64_t count, int64_t num_experts,
                    routing* result) {
  const int64_t first = begin * input.top_k;
  const int64_t last = first + count * input.top_k;
  std::vector<int32_t>& next = result->expert_begin;
  next.assign(static_cast<size_t>(num_experts + 1), 0);
  for (int64_t i = first; i < last; ++i) ++next[static_cast<size_t>(expert_at(input, i))];

  result->blocks.clear();
  int32_t rows = 0;
  for (int64_t expert = 0; expert < num_experts; ++expert) {
    const int32_t routed = next[static_cast<size_t>(expert)];
    for (int32_t done = 0; done < routed; done += max_block_rows) {
      const int32_t size = std::min(routed - done, static_cast<int32_t>(max_block_rows));
      result->blocks.push_back({static_cast<int32_t>(expert), rows + done, size});
    }
    next[static_cast<size_t>(expert)] = rows;
    rows += routed;
  }
  result->token.resize(static_cast<size_t>(rows));
  result->weight.resize(static_cast<size_t>(rows));
  for (int64_t i = first; i < last; ++i) {
    const int64_t expert = expert_at(input, i);
    if (expert == num_experts) continue;
    const size_t row = static_cast<size_t>(next[static_cast<size_t>(expert)]++);
    result->token[row] = static_cast<int32_t>((i - first) / input.top_k);
    result->weight[row] = load_float(input.weight, input.weight_kind, i);
  }
}

}  // namespace kt
