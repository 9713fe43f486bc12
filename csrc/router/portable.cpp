// router_logits in plain C++: the reference for the other files.
#include "../float_types.h"
#include "../isa.h"
#include "router.h"

namespace kt {

void router_logits_portable(const router_logits_args& args) {
  record_run(operation::router_logits, isa::portable);
  for (int64_t row = 0; row < args.rows; ++row) {
    for (int64_t e = 0; e < args.experts; ++e) {
      float lanes[8] = {};
      for (int64_t i = 0; i < args.n; ++i) {
        const float x = load_float(args.x, args.type, row * args.n + i);
        lanes[i % 8] = lanes[i % 8] + x * load_float(args.weight, args.type, e * args.n + i);
      }
      args.logits[row * args.logits_stride + e] = ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) +
                                                  ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]));
    }
  }
}

}  // namespace kt
