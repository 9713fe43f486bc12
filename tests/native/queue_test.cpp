// The queue of the standalone handle: many threads that submit and wait, jobs that fail, queues
// that go away with work in flight, fork, shutdown. No Python: made for sanitizers.
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "engine/queue.h"
#include "thread_pool.h"

namespace {

using std::chrono::milliseconds;

int failures = 0;

void expect(bool holds, const char* what) {
  if (holds) return;
  ++failures;
  std::fprintf(stderr, "FAILED: %s\n", what);
}

// What an error says; empty where there is none.
std::string text(const std::exception_ptr& error) {
  if (!error) return "";
  try {
    std::rethrow_exception(error);
  } catch (const std::exception& known) {
    return known.what();
  }
}

// A job that checks that it is computed once, in chunks in order, on the pool.
struct rows {
  explicit rows(int64_t count, int threads = 3) : seen(static_cast<size_t>(count)), on(threads) {}

  kt::job job(int64_t step) const {
    return {static_cast<int64_t>(seen.size()), step,
            [](const void* context, int64_t begin, int64_t count) {
              static_cast<const rows*>(context)->compute(begin, count);
            },
            this};
  }

  void compute(int64_t begin, int64_t count) const {
    if (begin != next) throw std::logic_error("chunks out of order");
    next = begin + count;
    struct chunk {
      const rows* of;
      int64_t begin;
    } work{this, begin};
    const kt::phase phases[] = {{count,
                                 [](void* context, int64_t task, int) {
                                   const chunk& c = *static_cast<chunk*>(context);
                                   ++c.of->seen[static_cast<size_t>(c.begin + task)];
                                 },
                                 &work}};
    kt::run_phases(phases, 1, on);
  }

  bool once() const {
    for (int times : seen) {
      if (times != 1) return false;
    }
    return true;
  }

  mutable std::vector<int> seen;
  mutable int64_t next = 0;
  int on;
};

void test_many_threads_submit_and_wait() {
  std::vector<std::unique_ptr<kt::queue>> queues;
  for (int i = 0; i < 3; ++i) queues.push_back(std::make_unique<kt::queue>());
  std::atomic<int> wrong{0};
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 6; ++caller) {
    callers.emplace_back([&, caller] {
      kt::queue& queue = *queues[static_cast<size_t>(caller % 3)];
      for (int repeat = 0; repeat < 100; ++repeat) {
        // The pool grows while others use it.
        const rows first(1 + repeat % 7, 1 + repeat % 5), second(1 + repeat % 13);
        queue.submit(first.job(1 + caller));
        const int64_t number = queue.submit(second.job(5));
        if (caller % 2) {
          queue.wait(number);
        } else {
          while (!queue.wait_for(number, milliseconds(1))) {
          }
        }
        if (!first.once() || !second.once()) ++wrong;
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  expect(wrong == 0, "every row of every job is computed once, before the wait ends");
  for (const auto& queue : queues) expect(!queue->take_error(), "no error");
}

// Blocks its job until it is told to go on.
struct gate {
  std::atomic<bool> begun{false}, open{false};

  kt::job job() {
    return {2, 1,
            [](const void* context, int64_t, int64_t) {
              gate* self = static_cast<gate*>(const_cast<void*>(context));
              self->begun = true;
              self->begun.notify_all();
              self->open.wait(false);
            },
            this};
  }
  void let_go() {
    open = true;
    open.notify_all();
  }
};

void test_submit_waits_for_nothing() {
  kt::queue queue;
  gate slow;
  const rows after(9);
  queue.submit(slow.job());
  const int64_t number = queue.submit(after.job(4));
  slow.begun.wait(false);
  expect(!queue.wait_for(number, milliseconds(1)), "a wait has a limit");
  expect(number == 2 && queue.submitted() == 2 && queue.ended() == 0, "jobs are counted");
  slow.let_go();
  queue.wait(number);
  expect(after.once() && queue.ended() == 2, "jobs end in order");
}

kt::job failing(const char* message) {
  return {3, 1,
          [](const void* context, int64_t begin, int64_t) {
            if (begin == 1) throw std::runtime_error(static_cast<const char*>(context));
            if (begin == 2) throw std::runtime_error("rows after an error are computed");
          },
          message};
}

void test_errors_are_kept_for_who_asks() {
  kt::queue queue, other;
  const rows good(5);
  queue.submit(failing("first"));
  queue.submit(failing("second"));
  const int64_t number = queue.submit(good.job(2));
  queue.wait(number);
  expect(good.once(), "a job behind a failure is computed");
  expect(text(queue.take_error()) == "first", "the first error is kept");
  expect(!queue.take_error(), "an error is told once");
  expect(!other.take_error(), "an error is its queue's");
}

void test_queue_may_go_with_work_in_flight() {
  for (int repeat = 0; repeat < 200; ++repeat) {
    std::vector<std::unique_ptr<rows>> jobs;
    kt::queue stays;
    const rows last(3);
    {
      kt::queue goes;
      for (int i = 0; i < 5; ++i) {
        jobs.push_back(std::make_unique<rows>(50));
        goes.submit(jobs.back()->job(1));
      }
      stays.submit(last.job(1));
      if (repeat % 2) goes.wait(2);
    }
    jobs.clear();  // under AddressSanitizer and ThreadSanitizer: nobody reads them now
    stays.wait(1);
    expect(last.once(), "the other queue's work is done");
  }
}

void test_dropped_job_is_an_error_and_keeps_its_place() {
  kt::queue queue;
  gate slow;
  const rows before(4), after(4);
  auto dropped = std::make_unique<rows>(4);
  queue.submit(slow.job());
  queue.submit(before.job(1));
  queue.submit(dropped->job(1));
  const int64_t number = queue.submit(after.job(1));
  slow.begun.wait(false);
  queue.drop(dropped.get(), "dropped");
  dropped.reset();
  expect(queue.ended() == 0, "nothing ends out of order");
  slow.let_go();
  queue.wait(number);
  expect(before.once() && after.once(), "the others are computed");
  expect(text(queue.take_error()) == "dropped", "what is dropped is an error");
}

// As a device would: no queue is asked, only memory.
void wait_for_done(const uint32_t& word) {
  while (!std::atomic_ref<uint32_t>(const_cast<uint32_t&>(word)).load(std::memory_order_acquire)) {
    std::this_thread::yield();
  }
}

void test_word_in_memory_says_when_a_job_has_ended() {
  kt::queue queue;
  gate slow;
  const rows good(6);
  uint32_t words[3] = {7, 7, 7};
  kt::job jobs[] = {slow.job(), good.job(2), failing("first")};
  for (int repeat = 0; repeat < 2; ++repeat) {  // as a graph that is launched again
    slow.begun = slow.open = false;
    good.next = 0;
    for (int i = 0; i < 3; ++i) {
      jobs[i].done = &words[i];
      queue.submit(jobs[i]);
    }
    slow.begun.wait(false);
    expect(words[0] == 0 && words[1] == 0 && words[2] == 0, "no job has ended");
    slow.let_go();
    for (const uint32_t& word : words) wait_for_done(word);
    for (int times : good.seen) expect(times == repeat + 1, "who reads the word sees the rows");
    queue.wait(queue.submitted());
    expect(text(queue.take_error()) == "first", "a job that fails has ended, too");
  }
}

void test_word_in_memory_is_set_for_a_job_that_is_dropped_and_left_alone_then() {
  kt::queue queue;
  gate slow;
  const rows dropped(4), lost(4);
  uint32_t words[2] = {7, 7};
  queue.submit(slow.job());
  kt::job job = dropped.job(1);
  job.done = &words[0];
  const int64_t number = queue.submit(job);
  {
    kt::queue goes;
    job = lost.job(1);
    job.done = &words[1];
    goes.submit(job);
  }
  queue.drop(&dropped, "dropped");
  expect(words[0] == 1 && words[1] == 1, "nobody waits for what was dropped");
  words[0] = 7;
  slow.let_go();
  queue.wait(number);
  expect(words[0] == 7, "nobody writes to what was dropped");
}

void test_times_are_those_of_the_work() {
  kt::queue queue;
  gate slow;
  const rows next(3), dropped(1);
  int64_t times[3][2] = {};
  kt::job jobs[] = {slow.job(), next.job(1), dropped.job(1)};
  const auto now = [] {
    return std::chrono::nanoseconds(std::chrono::steady_clock::now().time_since_epoch()).count();
  };
  const int64_t before = now();
  for (int i = 0; i < 3; ++i) {
    jobs[i].times = times[i];
    queue.submit(jobs[i]);
  }
  slow.begun.wait(false);
  const int64_t begun = now();
  queue.drop(&dropped, "dropped");
  slow.let_go();
  queue.wait(queue.submitted());
  const bool first = before <= times[0][0] && times[0][0] <= begun && begun <= times[0][1];
  expect(first && times[0][1] <= times[1][0] && times[1][0] <= times[1][1] && times[1][1] <= now(),
         "jobs begin and end one after the other");
  expect(times[2][0] == 0 && times[2][1] == 0, "what was dropped has no times");
}

#if !defined(__SANITIZE_THREAD__)  // ThreadSanitizer does not support threads after fork
void test_fork() {
  kt::queue queue;
  gate slow;
  const rows in_parent(6);
  queue.submit(slow.job());
  const int64_t number = queue.submit(in_parent.job(2));
  slow.begun.wait(false);
  const pid_t child = fork();
  if (child == 0) {
    const rows lost(3), fresh(3);
    uint32_t done = 0;
    kt::job job = lost.job(1);
    job.done = &done;
    queue.submit(job);
    queue.wait(number);
    queue.drop(&lost, "");
    bool good = queue.lost_in_fork() && !queue.take_error() && lost.next == 0 && done == 1;
    {
      kt::queue own;
      own.wait(own.submit(fresh.job(1)));
      good &= fresh.once() && !own.lost_in_fork();
    }
    kt::close_queues();
    queue.~queue();
    _exit(good ? 0 : 1);
  }
  int status = 0;
  waitpid(child, &status, 0);
  expect(WIFEXITED(status) && WEXITSTATUS(status) == 0, "a child has queues of its own only");
  slow.let_go();
  queue.wait(number);
  expect(in_parent.once(), "the parent's work is done");
}
#endif

// The last test: there is no way back.
void test_close() {
  kt::queue queue;
  std::atomic<bool> stop{false};
  std::vector<std::thread> callers;
  std::vector<std::unique_ptr<rows>> jobs;
  for (int i = 0; i < 4; ++i) jobs.push_back(std::make_unique<rows>(1 << 20));
  for (const auto& job : jobs) {
    callers.emplace_back([&] {
      queue.wait(queue.submit(job->job(1)));
      while (!stop) queue.submit(job->job(1));
    });
  }
  queue.wait_for(1, milliseconds(5));
  kt::close_queues();
  stop = true;
  for (std::thread& caller : callers) caller.join();
  jobs.clear();
  const rows refused(1);
  uint32_t done = 0;
  kt::job late = refused.job(1);
  late.done = &done;
  queue.submit(late);
  expect(done == 1, "nobody waits for what is refused");
  queue.wait(queue.submitted());
  expect(text(queue.take_error()) ==
             "the interpreter exits: what was not computed by then was dropped",
         "closing drops");
}

}  // namespace

int main() {
  test_many_threads_submit_and_wait();
  test_submit_waits_for_nothing();
  test_errors_are_kept_for_who_asks();
  test_queue_may_go_with_work_in_flight();
  test_dropped_job_is_an_error_and_keeps_its_place();
  test_word_in_memory_says_when_a_job_has_ended();
  test_word_in_memory_is_set_for_a_job_that_is_dropped_and_left_alone_then();
  test_times_are_those_of_the_work();
#if !defined(__SANITIZE_THREAD__)
  test_fork();
#endif
  test_close();
  std::printf("queue %s\n", failures ? "FAILED" : "passed");
  return failures ? 1 : 0;
}
