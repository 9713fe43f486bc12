// The instruction peak of several threads together: the limit that prefill is compared with.
#pragma once

#include "peak.h"

namespace kt {

// Operations (multiplications and additions) per second over about `seconds`.
double peak_rate(peak_fn* kernel, int threads, double seconds);

}  // namespace kt
