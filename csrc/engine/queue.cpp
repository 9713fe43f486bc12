// The dispatcher: see queue.h for what it promises.
#include "queue.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <stdexcept>
#include <thread>
#include <utility>

#include "../blocked_signals.h"

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace kt {
namespace {

void set_done(const job& work, uint32_t value) {
  if (work.done) std::atomic_ref<uint32_t>(*work.done).store(value, std::memory_order_release);
}

void note_time(const job& work, int which) {
  if (!work.times) return;
  const auto now = std::chrono::steady_clock::now().time_since_epoch();
  work.times[which] = std::chrono::duration_cast<std::chrono::nanoseconds>(now).count();
}

}  // namespace

// Its mutex is not held during work: who waits for the mutex waits for some instructions only.
class dispatcher {
 public:
  void start() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (started_) return;
    const blocked_signals in_thread;
    std::thread([this] { run(); }).detach();
    started_ = true;
  }

  int64_t submit(queue* owner, const job& work) {
    const std::lock_guard<std::mutex> lock(mutex_);
    set_done(work, 0);
    try {
      if (closed_) throw std::runtime_error(exit_message);
      jobs_.push_back({owner, work});
      ++owner->submitted_;
      work_.notify_one();
    } catch (...) {
      fail(owner, std::current_exception());
      set_done(work, 1);
    }
    return owner->submitted_;
  }

  int64_t read(const int64_t& count) {
    const std::lock_guard<std::mutex> lock(mutex_);
    return count;
  }

  bool wait_for(const queue* owner, int64_t count, std::chrono::milliseconds limit) {
    std::unique_lock<std::mutex> lock(mutex_);
    return progress_.wait_for(lock, limit, [&] { return owner->ended_ >= count; });
  }

  void wait(const queue* owner, int64_t count) {
    std::unique_lock<std::mutex> lock(mutex_);
    progress_.wait(lock, [&] { return owner->ended_ >= count; });
  }

  std::exception_ptr take_error(queue* owner) {
    const std::lock_guard<std::mutex> lock(mutex_);
    return std::exchange(owner->error_, nullptr);
  }

  // Jobs keep their places, lest they end out of order, but have nothing left to compute.
  template <typename predicate>
  void drop(const predicate& meant, const char* error) {
    std::unique_lock<std::mutex> lock(mutex_);
    const auto empty = [&](entry& one) {
      set_done(one.work, 1);
      one.work.rows = 0;
      one.work.done = nullptr;
      one.work.times = nullptr;
      fail(one.owner, std::make_exception_ptr(std::runtime_error(error)));
    };
    for (entry& one : jobs_) {
      if (meant(one.owner, one.work)) empty(one);
    }
    const auto runs = [&] { return running_.owner && meant(running_.owner, running_.work); };
    if (runs()) empty(running_);
    progress_.wait(lock, [&] { return !runs(); });
  }

  void forget(const queue* owner) {
    std::unique_lock<std::mutex> lock(mutex_);
    std::erase_if(jobs_, [&](const entry& one) {
      if (one.owner == owner) set_done(one.work, 1);
      return one.owner == owner;
    });
    if (running_.owner == owner) running_.work.rows = 0;
    progress_.wait(lock, [&] { return running_.owner != owner; });
  }

  void close() {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      closed_ = true;
    }
    drop([](const queue*, const job&) { return true; }, exit_message);
  }

 private:
  struct entry {
    queue* owner;
    job work;
  };

  static constexpr const char* exit_message =
      "the interpreter exits: what was not computed by then was dropped";

  static std::exception_ptr compute(const job& work, int64_t begin) noexcept {
    try {
      work.compute(work.context, begin, std::min(work.step, work.rows - begin));
      return nullptr;
    } catch (...) {
      return std::current_exception();
    }
  }

  static void fail(queue* owner, std::exception_ptr error) {
    if (!owner->error_) owner->error_ = std::move(error);
  }

  [[noreturn]] void run() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      work_.wait(lock, [this] { return !jobs_.empty(); });
      running_ = jobs_.front();
      jobs_.pop_front();
      const job work = running_.work;
      note_time(work, 0);
      for (int64_t begin = 0; begin < running_.work.rows; begin += work.step) {
        lock.unlock();
        std::exception_ptr error = compute(work, begin);
        lock.lock();
        if (!error) continue;
        fail(running_.owner, std::move(error));
        break;
      }
      note_time(running_.work, 1);
      set_done(running_.work, 1);
      ++running_.owner->ended_;
      running_.owner = nullptr;
      progress_.notify_all();
    }
  }

  std::mutex mutex_;
  std::condition_variable work_, progress_;
  std::deque<entry> jobs_;
  entry running_{};  // of nobody between two jobs
  bool started_ = false;
  bool closed_ = false;
};

namespace {

// Never destroyed: its thread may outlive every static object at exit.
std::atomic<dispatcher*> the_dispatcher{nullptr};

dispatcher* find_dispatcher() {
  dispatcher* existing = the_dispatcher.load();
  if (existing) return existing;
#if defined(__unix__) || defined(__APPLE__)
  // The thread does not exist in the child, and the mutex may have been held: both are abandoned.
  static const int registered =
      pthread_atfork(nullptr, nullptr, [] { the_dispatcher.store(nullptr); });
  (void)registered;
#endif
  dispatcher* fresh = new dispatcher;
  if (the_dispatcher.compare_exchange_strong(existing, fresh)) return fresh;
  delete fresh;
  return existing;
}

}  // namespace

queue::queue() : dispatcher_(find_dispatcher()) { dispatcher_->start(); }

queue::~queue() {
  if (!lost_in_fork()) dispatcher_->forget(this);
}

int64_t queue::submit(const job& work) noexcept {
  if (!lost_in_fork()) return dispatcher_->submit(this, work);
  set_done(work, 1);
  return 0;
}

int64_t queue::submitted() const noexcept {
  return lost_in_fork() ? 0 : dispatcher_->read(submitted_);
}

int64_t queue::ended() const noexcept { return lost_in_fork() ? 0 : dispatcher_->read(ended_); }

bool queue::wait_for(int64_t count, std::chrono::milliseconds limit) const noexcept {
  return lost_in_fork() || dispatcher_->wait_for(this, count, limit);
}

void queue::wait(int64_t count) const noexcept {
  if (!lost_in_fork()) dispatcher_->wait(this, count);
}

void queue::drop(const void* context, const char* error) noexcept {
  if (lost_in_fork()) return;
  dispatcher_->drop(
      [&](const queue* owner, const job& work) { return owner == this && work.context == context; },
      error);
}

std::exception_ptr queue::take_error() noexcept {
  return lost_in_fork() ? nullptr : dispatcher_->take_error(this);
}

bool queue::lost_in_fork() const noexcept { return dispatcher_ != the_dispatcher.load(); }

void close_queues() noexcept {
  if (dispatcher* existing = the_dispatcher.load()) existing->close();
}

}  // namespace kt
