// Work that is handed in now and waited for later: what the standalone handle for other engines is
// made of.
//
// One thread per process, the dispatcher, takes jobs in the order in which they came, of all queues
// alike, and computes each chunk by chunk: two jobs at once would only wait for each other in the
// pool. It starts with the first queue, sleeps where there is nothing to do, and ends with the
// process. It knows no Python, so that who waits for it may hold the GIL.
//
// After a fork the child has no dispatcher: queues made before are of no use there, and ignore what
// is handed in. After close_queues() that is an error, which the queue keeps.
#pragma once

#include <chrono>
#include <cstdint>
#include <exception>

namespace kt {

class dispatcher;

// Rows, computed at most `step` at a time.
struct job {
  int64_t rows;
  int64_t step;
  // May throw: the job then ends, and the queue keeps the exception.
  void (*compute)(const void* context, int64_t begin, int64_t count);
  const void* context;  // must live until the job has ended or was dropped
  // Where not nullptr: 0 from submit on, 1 once the job has ended, failed or was dropped; what it
  // wrote is there for who reads the 1. For a device that waits for a word in memory. It lives as
  // long as the context, and serves one job at a time.
  uint32_t* done = nullptr;
  // Where not nullptr: when the job began and when it ended, in ns of std::chrono::steady_clock,
  // written before `done` is. Lives as long; what is dropped leaves it alone.
  int64_t* times = nullptr;
};

class queue {
 public:
  queue();   // throws std::system_error where the system refuses to start the dispatcher
  ~queue();  // drops every job; from then on nothing refers to their contexts
  queue(const queue&) = delete;
  queue& operator=(const queue&) = delete;

  // Hands a job in, and waits for none. Returns how many have been so far, this one included.
  int64_t submit(const job& work) noexcept;
  int64_t submitted() const noexcept;

  // How many jobs have ended; they do in the order in which they were handed in.
  int64_t ended() const noexcept;

  // Waits until `count` jobs have ended; false where that takes longer than the limit.
  bool wait_for(int64_t count, std::chrono::milliseconds limit) const noexcept;
  void wait(int64_t count) const noexcept;

  // Makes an error of the jobs with this context that have not ended, and waits for the chunk in
  // computation if it is one of theirs: from then on nothing refers to the context.
  void drop(const void* context, const char* error) noexcept;

  // The first error since the last call, or nullptr.
  std::exception_ptr take_error() noexcept;

  // Whether this process is a child, forked off the one in which the queue was made.
  bool lost_in_fork() const noexcept;

 private:
  friend class dispatcher;

  dispatcher* const dispatcher_;
  // Under the dispatcher's mutex:
  int64_t submitted_ = 0;
  int64_t ended_ = 0;
  std::exception_ptr error_;
};

// Drops all jobs of this process, waits for the chunk in computation and refuses what comes later:
// for the exit of an interpreter that is about to free what jobs refer to.
void close_queues() noexcept;

}  // namespace kt
