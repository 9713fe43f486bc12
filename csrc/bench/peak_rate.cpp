// Runs a peak kernel on several threads at once.
#include <atomic>
#include <chrono>

#include "../thread_pool.h"
#include "peak_rate.h"

namespace kt {
namespace {

constexpr int64_t iterations_per_task = 20000;
constexpr int64_t tasks_per_thread = 8;

struct peak_job {
  peak_fn* kernel;
  std::atomic<int64_t> operations{0};
  std::atomic<int32_t> guard{0};
};

void peak_task(void* context, int64_t, int) {
  peak_job* job = static_cast<peak_job*>(context);
  const peak_result result = job->kernel(iterations_per_task);
  job->operations.fetch_add(result.operations, std::memory_order_relaxed);
  job->guard.fetch_xor(result.guard, std::memory_order_relaxed);
}

}  // namespace

double peak_rate(peak_fn* kernel, int threads, double seconds) {
  peak_job job{kernel};
  const phase phases[] = {{tasks_per_thread * threads, peak_task, &job}};
  const auto start = std::chrono::steady_clock::now();
  std::chrono::duration<double> elapsed{0};
  do {
    run_phases(phases, 1, threads);
    elapsed = std::chrono::steady_clock::now() - start;
  } while (elapsed.count() < seconds);
  return static_cast<double>(job.operations.load()) / elapsed.count();
}

}  // namespace kt
