// How the absorbed form cuts a chunk into tasks.
#pragma once

#include <cstdint>
#include <vector>

namespace kt {

// What the keys of a sequence are cut into, so that threads share them: a number that depends on
// the sequence and the number of its queries alone, and is bounded, however long it is.
struct key_parts {
  int64_t count, keys;
};

// One sequence of a chunk. Its queries are columns, by token and then head.
struct sequence_rows {
  int64_t sequence;
  key_parts parts;
  int64_t first_partial;  // row of its first part; each part has a row per column
};

// A block of a sequence's queries times a part of its keys.
struct attend_task {
  int64_t index;  // of the sequence in the chunk
  int64_t column, columns;
  int64_t part;
};

struct absorbed_plan {
  std::vector<sequence_rows> sequences;
  std::vector<attend_task> tasks;
  int64_t partial_rows;
  int64_t most_parts;  // of one sequence
};

}  // namespace kt
