// Sorts the routed (token, slot) pairs of a call by expert.
#pragma once

#include <cstdint>
#include <vector>

#include "../quantize/quantize.h"

namespace kt {

enum class index_type : uint8_t { int32, int64 };

// What the router chose. An index equal to the number of experts means "skip this slot".
struct routing_input {
  int64_t tokens;
  int64_t top_k;
  const void* index;  // [tokens][top_k]
  index_type index_kind;
  const void* weight;  // [tokens][top_k]
  float_type weight_kind;
};

int64_t expert_at(const routing_input& input, int64_t position);

// Position (token * top_k + slot) of the first index outside [0, num_experts], or -1.
int64_t first_bad_index(const routing_input& input, int64_t num_experts);

// Rows of one expert, at most max_block_rows of them: the unit of work.
struct routed_block {
  int32_t expert;
  int32_t begin;
  int32_t rows;
};

constexpr int64_t max_block_rows = 256;

// One row per routed pair, in ascending (expert, token, slot): the order in which outputs are
// summed.
struct routing {
  std::vector<int32_t> token;         // [rows]
  std::vector<float> weight;          // [rows]
  std::vector<routed_block> blocks;   // ascending
  std::vector<int32_t> expert_begin;  // [num_experts + 1], while sorting
};

// Fills `result` for tokens [begin, begin + count), numbered from 0. Indices must be in range.
void sort_by_expert(const routing_input& input, int64_t begin, int64_t count, int64_t num_experts,
                    routing* result);

}  // namespace kt
