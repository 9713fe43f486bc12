// rotate, in plain C++: some hundred pairs a token.
#include "rotary.h"

#include <cassert>

#include "../float_types.h"

namespace kt {

void rotate(const rotary_args& args) {
  assert(args.n % 2 == 0 && args.n <= max_rotary);
  const int64_t pairs = args.n / 2;
  const rotary_angles& angles = args.angles;
  float cos[max_rotary / 2], sin[max_rotary / 2], row[max_rotary];
  for (int64_t j = 0; j < pairs; ++j) {
    const int64_t at = args.token * angles.stride + j * angles.step;
    cos[j] = load_float(angles.cos, angles.type, at);
    sin[j] = load_float(angles.sin, angles.type, at);
  }
  const bool from_halves = args.form == rotary_form::halves;
  const bool to_halves = args.form != rotary_form::neighbours;
  for (int64_t head = 0; head < args.heads; ++head) {
    for (int64_t i = 0; i < args.n; ++i) {
      row[i] = load_float(args.x, args.type, head * args.x_stride + i);
    }
    const int64_t first = head * args.out_stride;
    for (int64_t j = 0; j < pairs; ++j) {
      const float a = from_halves ? row[j] : row[2 * j];
      const float b = from_halves ? row[pairs + j] : row[2 * j + 1];
      const int64_t at = to_halves ? j : 2 * j, other = to_halves ? pairs + j : 2 * j + 1;
      store_float(args.out, args.type, first + at, a * cos[j] - b * sin[j]);
      store_float(args.out, args.type, first + other, b * cos[j] + a * sin[j]);
    }
  }
}

}  // namespace kt
