// weighted_add and round_rows in plain C++: the reference for the other files.
#include <bit>
#include <cassert>
#include <limits>

#include "../float_types.h"
#include "../isa.h"
#include "combine.h"

namespace kt {

void weighted_add_portable(const weighted_add_args& args) {
  record_run(operation::weighted_add, isa::portable);
  assert(args.n % 16 == 0);
  for (int64_t i = 0; i < args.rows; ++i) {
    const float weight = args.weight[i];
    const float* d = args.d + i * args.d_stride;
    float* y = args.y + args.token[i] * args.y_stride;
    for (int64_t j = 0; j < args.n; ++j) y[j] = y[j] + weight * d[j];
  }
}

void round_rows_portable(const round_rows_args& args) {
  record_run(operation::round_rows, isa::portable);
  for (int64_t row = 0; row < args.rows; ++row) {
    const float* y = args.y + row * args.y_stride;
    if (args.type == float_type::bf16) {
      uint16_t* out = static_cast<uint16_t*>(args.out) + row * args.out_stride;
      for (int64_t j = 0; j < args.n; ++j) out[j] = float_to_bf16(y[j]);
    } else {
      float* out = static_cast<float*>(args.out) + row * args.out_stride;
      for (int64_t j = 0; j < args.n; ++j) {
        out[j] = y[j] == y[j] ? y[j] : std::numeric_limits<float>::quiet_NaN();
      }
    }
  }
}

}  // namespace kt
