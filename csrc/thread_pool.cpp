// The pool: see thread_pool.h for what it promises.
#include "thread_pool.h"

#include <algorithm>
#include <atomic>
#include <cassert>
#include <cfenv>
#include <chrono>
#include <exception>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "blocked_signals.h"
#include "topology.h"

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif
#if defined(__linux__)
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace kt {
namespace {

// Long enough to bridge the gap between two phases, short enough not to take a core from torch's
// own threads: a futex wake-up costs about as much.
constexpr std::chrono::microseconds spin_time{40};
constexpr int polls_per_clock_read = 32;

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// Returns when `word` is no longer `old`.
void wait_while_equal(const std::atomic<uint32_t>& word, uint32_t old) {
  const auto deadline = std::chrono::steady_clock::now() + spin_time;
  do {
    for (int i = 0; i < polls_per_clock_read; ++i) {
      if (word.load(std::memory_order_acquire) != old) return;
      pause();
    }
  } while (std::chrono::steady_clock::now() < deadline);
  while (word.load(std::memory_order_acquire) == old) word.wait(old, std::memory_order_acquire);
}

// Tasks run with the default rounding mode and with subnormals, whatever the caller has set.
class default_float_environment {
 public:
  default_float_environment() {
    fegetenv(&saved_);
    fesetenv(FE_DFL_ENV);
  }
  ~default_float_environment() { fesetenv(&saved_); }

 private:
  fenv_t saved_;
};

struct cpu_and_node {
  int cpu, node;
};

// Where the calling thread runs now.
cpu_and_node here() {
#if defined(__linux__)
  unsigned cpu = 0, node = 0;
  if (syscall(SYS_getcpu, &cpu, &node, nullptr) == 0) {
    return {static_cast<int>(cpu), static_cast<int>(node)};
  }
#endif
  return {-1, 0};
}

// Returns whether the thread is now held to these CPUs. A refusal (a cgroup that has just been
// changed) leaves it where it was.
bool hold(std::thread& thread, const std::vector<int>& cpus) {
  bool held = false;
#if defined(__linux__)
  if (cpus.empty()) return false;
  const size_t possible = static_cast<size_t>(*std::max_element(cpus.begin(), cpus.end())) + 1;
  cpu_set_t* set = CPU_ALLOC(possible);
  if (!set) return false;
  const size_t bytes = CPU_ALLOC_SIZE(possible);
  CPU_ZERO_S(bytes, set);
  for (int cpu : cpus) CPU_SET_S(static_cast<size_t>(cpu), bytes, set);
  held = pthread_setaffinity_np(thread.native_handle(), bytes, set) == 0;
  CPU_FREE(set);
#else
  (void)thread;
  (void)cpus;
#endif
  return held;
}

constexpr int no_node = -1;

struct alignas(64) claim_range {
  std::atomic<int64_t> next{0};
  int64_t end = 0;
};

struct alignas(64) phase_state {
  claim_range ranges[max_task_groups];  // one for each group; without groups the first is all
  alignas(64) std::atomic<int64_t> done{0};
  std::atomic<uint32_t> finished{0};
};

class thread_pool {
 public:
  thread_pool() {
    for (std::atomic<int>& node : nodes_) node.store(no_node, std::memory_order_relaxed);
  }

  void run(const phase* phases, int count, int threads) {
    const std::lock_guard<std::mutex> one_job_at_a_time(mutex_);
    start_workers(threads - 1);
    phases_ = phases;
    count_ = count;
    threads_ = threads;
    for (int p = 0; p < count; ++p) {
      set_ranges(phases[p], &states_[p]);
      states_[p].done.store(0, std::memory_order_relaxed);
      states_[p].finished.store(phases[p].tasks == 0, std::memory_order_relaxed);
    }
    gate_.store(gate_open, std::memory_order_release);
    epoch_.fetch_add(1, std::memory_order_release);
    epoch_.notify_all();
    take_part(0);
    wait_while_equal(states_[count - 1].finished, 0);
    uint32_t inside = gate_.fetch_and(~gate_open, std::memory_order_acq_rel) & ~gate_open;
    while (inside != 0) {
      wait_while_equal(gate_, inside);
      inside = gate_.load(std::memory_order_acquire);
    }
    if (failed_.exchange(false, std::memory_order_relaxed)) {
      std::rethrow_exception(std::exchange(error_, nullptr));
    }
  }

  int workers() const { return workers_.load(std::memory_order_relaxed); }

  int node(int worker) const {
    const int held = nodes_[worker].load(std::memory_order_relaxed);
    return held == no_node ? here().node : held;
  }

 private:
  static constexpr uint32_t gate_open = 1u << 31;  // the low bits count the workers inside

  void start_workers(int wanted) {
    if (workers() >= wanted) return;
    const topology machine = read_topology();
    if (workers() == 0) first_cores_ = machine.cores;
    std::vector<placement> places;
    if (machine.cores == first_cores_) places = place_threads(machine, wanted + 1, here().cpu);
    for (int have = workers(); have < wanted; ++have) {
      const uint32_t epoch = epoch_.load(std::memory_order_relaxed);
      const blocked_signals in_worker;
      std::thread worker([this, have, epoch] { work(have + 1, epoch); });
      if (!places.empty() && hold(worker, places[static_cast<size_t>(have) + 1].cpus)) {
        nodes_[have + 1].store(places[static_cast<size_t>(have) + 1].node,
                               std::memory_order_relaxed);
      }
      worker.detach();
      workers_.store(have + 1, std::memory_order_relaxed);
    }
  }

  void work(int index, uint32_t seen) {
    fesetenv(FE_DFL_ENV);
    for (;;) {
      wait_while_equal(epoch_, seen);
      seen = epoch_.load(std::memory_order_acquire);
      if (!enter()) continue;
      if (index < threads_) take_part(index);
      leave();
    }
  }

  bool enter() {
    uint32_t value = gate_.load(std::memory_order_acquire);
    while (value & gate_open) {
      if (gate_.compare_exchange_weak(value, value + 1, std::memory_order_acq_rel)) return true;
    }
    return false;
  }

  void leave() {
    const uint32_t now = gate_.fetch_sub(1, std::memory_order_acq_rel) - 1;
    if (!(now & gate_open)) gate_.notify_all();
  }

  // Keeps the first exception of a job, for its caller.
  void run_task(const phase& current, int64_t task, int worker) noexcept {
    try {
      current.run(current.context, task, worker);
    } catch (...) {
      if (!failed_.exchange(true, std::memory_order_relaxed)) error_ = std::current_exception();
    }
  }

  // Claims tasks phase by phase; returns when the last phase has no task left to claim. After a
  // failure tasks are claimed and not run: that way the job ends as any other does.
  void take_part(int worker) {
    for (int p = 0; p < count_; ++p) {
      if (p > 0) wait_while_equal(states_[p - 1].finished, 0);
      const int ranges = range_count(phases_[p]), own = own_group(phases_[p], worker);
      for (int i = 0; i < ranges; ++i) claim(phases_[p], &states_[p], (own + i) % ranges, worker);
    }
  }

  static int range_count(const phase& of) { return std::max(of.group_count, 1); }

  static void set_ranges(const phase& of, phase_state* state) {
    int64_t begin = 0;
    for (int i = 0; i < range_count(of); ++i) {
      const int64_t end = of.group_count ? begin + of.groups[i].tasks : of.tasks;
      state->ranges[i].next.store(begin, std::memory_order_relaxed);
      state->ranges[i].end = end;
      begin = end;
    }
  }

  // Where no group is of the worker's node, workers spread over all of them.
  int own_group(const phase& of, int worker) const {
    if (of.group_count < 2) return 0;
    const int mine = node(worker);
    for (int i = 0; i < of.group_count; ++i) {
      if (of.groups[i].node == mine) return i;
    }
    return worker % of.group_count;
  }

  void claim(const phase& of, phase_state* state, int range, int worker) {
    claim_range& tasks = state->ranges[range];
    int64_t task;
    while ((task = tasks.next.fetch_add(1, std::memory_order_relaxed)) < tasks.end) {
      if (!failed_.load(std::memory_order_relaxed)) run_task(of, task, worker);
      if (state->done.fetch_add(1, std::memory_order_acq_rel) + 1 == of.tasks) {
        state->finished.store(1, std::memory_order_release);
        state->finished.notify_all();
      }
    }
  }

  std::mutex mutex_;
  std::atomic<int> workers_{0};
  std::atomic<int> nodes_[max_threads];
  std::vector<core> first_cores_;  // that the first workers were placed on
  alignas(64) std::atomic<uint32_t> epoch_{0};
  alignas(64) std::atomic<uint32_t> gate_{0};
  // The job; written only while the gate is closed and nobody is inside.
  alignas(64) const phase* phases_ = nullptr;
  int count_ = 0;
  int threads_ = 0;
  phase_state states_[max_phases];
  alignas(64) std::atomic<bool> failed_{false};
  std::exception_ptr error_;  // of who set failed_; read when everybody has left
};

// Never destroyed: its threads may outlive every static object at exit.
std::atomic<thread_pool*> the_pool{nullptr};

thread_pool& pool() {
  thread_pool* existing = the_pool.load(std::memory_order_acquire);
  if (existing) return *existing;
#if defined(__unix__) || defined(__APPLE__)
  static const int registered = pthread_atfork(nullptr, nullptr, [] {
    // The threads do not exist in the child, and the pool may have been in use: it is abandoned.
    the_pool.store(nullptr, std::memory_order_release);
  });
  (void)registered;
#endif
  thread_pool* fresh = new thread_pool;
  if (the_pool.compare_exchange_strong(existing, fresh, std::memory_order_acq_rel)) return *fresh;
  delete fresh;
  return *existing;
}

}  // namespace

void run_phases(const phase* phases, int count, int threads) {
  assert(count >= 1 && count <= max_phases && threads >= 1 && threads <= max_threads);
  const default_float_environment environment;
  if (threads > 1) return pool().run(phases, count, threads);
  for (int p = 0; p < count; ++p) {
    for (int64_t task = 0; task < phases[p].tasks; ++task)
      phases[p].run(phases[p].context, task, 0);
  }
}

int pool_threads() {
  const thread_pool* existing = the_pool.load(std::memory_order_acquire);
  return existing ? existing->workers() : 0;
}

int worker_node(int worker) {
  assert(worker >= 0 && worker < max_threads);
  const thread_pool* existing = the_pool.load(std::memory_order_acquire);
  return existing ? existing->node(worker) : here().node;
}

}  // namespace kt
