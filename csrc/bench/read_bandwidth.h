// Streaming reads of a buffer: the limit that decode is compared with.
#pragma once

#include <cstdint>

namespace kt {

// Reads `bytes` at `data` again and again with `threads` threads for about `seconds`; returns bytes
// per second. `data` should be several times larger than the last-level cache.
double read_bandwidth(const void* data, int64_t bytes, int threads, double seconds);

}  // namespace kt
