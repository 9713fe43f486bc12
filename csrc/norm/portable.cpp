// rms_norm and add_rows in plain C++: the reference for the other files.
#include <cmath>

#include "../float_types.h"
#include "../isa.h"
#include "norm.h"

namespace kt {
namespace {

float rounded(float value, float_type type) {
  return type == float_type::bf16 ? bf16_to_float(float_to_bf16(value)) : value;
}

}  // namespace

void rms_norm_portable(const rms_norm_args& args) {
  record_run(operation::rms_norm, isa::portable);
  for (int64_t row = 0; row < args.rows; ++row) {
    const int64_t first = row * args.x_stride;
    float lanes[8] = {};
    for (int64_t i = 0; i < args.n; ++i) {
      const float x = load_float(args.x, args.type, first + i);
      lanes[i % 8] = lanes[i % 8] + x * x;
    }
    const float sum = ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) +
                      ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]));
    const float r = 1.0f / std::sqrt(sum / static_cast<float>(args.n) + args.eps);
    for (int64_t i = 0; i < args.n; ++i) {
      const float x = rounded(load_float(args.x, args.type, first + i) * r, args.type);
      const float y = load_float(args.weight, args.type, i) * x;
      store_float(args.out, args.type, row * args.n + i, y);
    }
  }
}

void add_rows_portable(const add_rows_args& args) {
  record_run(operation::add_rows, isa::portable);
  for (int64_t i = 0; i < args.count; ++i) {
    const float sum = load_float(args.a, args.type, i) + load_float(args.b, args.type, i);
    store_float(args.out, args.type, i, sum);
  }
}

}  // namespace kt
