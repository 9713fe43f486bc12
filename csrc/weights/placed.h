// The packed weights of a layer's matrices in one or several parts of memory (numa_memory.h).
//
// The matrices are of one shape, one per expert, or two where gate and up are stored together. A
// part holds a range of the outputs of every matrix, or, where parts are copies, everything.
#pragma once

#include <cstdint>
#include <vector>

#include "rows.h"

namespace kt {

struct weight_part {
  int node;  // that its memory lies on; nobody asks where there is one part
  int64_t first_output;
  int64_t outputs;       // first and number are multiples of 32
  packed_matrix memory;  // [matrices][outputs]
};

struct placed_weight {
  std::vector<weight_part> parts;  // at least one; where they are no copies, all outputs in order
  bool copies;
};

// All outputs of every matrix, as padded, in one part.
inline placed_weight in_one_part(const packed_matrix& memory, int64_t outputs) {
  return {{{0, 0, outputs, memory}}, false};
}

// The outputs of one matrix from `output` on, which lies in this part; k inputs.
inline packed_matrix outputs_in(weight_format format, const weight_part& part, int64_t matrix,
                                int64_t output, int64_t k) {
  return outputs_from(format, part.memory, matrix * part.outputs + output - part.first_output, k);
}

}  // namespace kt
