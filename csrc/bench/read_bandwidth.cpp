// read_bandwidth: sums 64-bit words in slices that the threads claim.
#include "read_bandwidth.h"

#include <atomic>
#include <chrono>

#include "../thread_pool.h"

namespace kt {
namespace {

constexpr int64_t slice_bytes = 1 << 20;

struct sweep {
  const uint64_t* words;
  std::atomic<uint64_t> guard{0};
};

void read_slice(void* context, int64_t task, int) {
  sweep* all = static_cast<sweep*>(context);
  constexpr int64_t words = slice_bytes / 8, half = words / 2;
  constexpr int line = 8, ahead = 64 * line;  // words of a cache line, and of 4 KiB
  const uint64_t* slice = all->words + task * words;
  uint64_t sums[2 * line] = {};
  // In two places at once, asked for in advance: the fastest of what was tried on Zen 3.
  for (int64_t i = 0; i < half; i += line) {
    __builtin_prefetch(slice + i + ahead);
    __builtin_prefetch(slice + half + i + ahead);
    for (int lane = 0; lane < line; ++lane) sums[lane] += slice[i + lane];
    for (int lane = 0; lane < line; ++lane) sums[line + lane] += slice[half + i + lane];
  }
  uint64_t total = 0;
  for (uint64_t sum : sums) total += sum;
  all->guard.fetch_xor(total, std::memory_order_relaxed);
}

}  // namespace

double read_bandwidth(const void* data, int64_t bytes, int threads, double seconds) {
  sweep all{static_cast<const uint64_t*>(data)};
  const phase phases[] = {{bytes / slice_bytes, read_slice, &all}};
  const auto start = std::chrono::steady_clock::now();
  std::chrono::duration<double> elapsed{0};
  double total = 0;
  do {
    run_phases(phases, 1, threads);
    total += static_cast<double>(bytes / slice_bytes * slice_bytes);
    elapsed = std::chrono::steady_clock::now() - start;
  } while (elapsed.count() < seconds);
  return total / elapsed.count();
}

}  // namespace kt
