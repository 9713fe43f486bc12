// One pool of threads for the process.
//
// A job is a short list of phases; a phase is a number of tasks that any thread may claim. A phase
// starts when every task of the one before has finished: nothing waits for a thread that has not
// woken up, because the others do its share. The calling thread takes part. Waiting threads spin
// for a bounded time and then sleep, so that an idle pool uses no processor time.
//
// The tasks of a phase may come in groups that belong to NUMA nodes. A worker takes those of its
// own node first, then helps the others: which worker runs a task is never promised.
//
// Jobs of several callers run one after another. Worker threads block every signal but those of
// faults. After fork the child has a new pool, without threads until it is used.
//
// Workers are held to cores or nodes (place_threads in topology.h says when to which), once, when
// they start: a mask that is changed later, say by taskset -a or a cgroup, is the user's wish and
// stands. A pool that grows after its caller's mask has changed leaves the newcomers unheld, since
// the older ones keep what they have. The calling thread belongs to the caller and is never held.
#pragma once

#include <cstdint>

namespace kt {

constexpr int max_phases = 4;
constexpr int max_task_groups = 64;  // per phase: more nodes than servers have

// Consecutive tasks that the workers of a node take first.
struct task_group {
  int node;
  int64_t tasks;
};

struct phase {
  int64_t tasks;
  // `worker` is in [0, threads) and no two tasks run with the same one at the same time.
  void (*run)(void* context, int64_t task, int worker);
  void* context;
  // All of the tasks, in groups; none: they belong to no node.
  const task_group* groups = nullptr;
  int group_count = 0;
};

constexpr int max_threads = 1024;

// Runs the phases on up to `threads` threads. With threads == 1 the pool is not touched.
//
// What a task throws reaches the caller: the first exception, once every thread has left the job.
// Tasks that had not started by then never do. Throws std::system_error, before any task has run,
// where the system refuses to start a thread.
void run_phases(const phase* phases, int count, int threads);

// The number of threads to use where nobody says otherwise: the physical cores that this process
// may use (affinity mask), but no more than its cgroup's CPU quota, rounded down, and at least 1.
int default_threads();

// Worker threads that exist now in this process.
int pool_threads();

// The NUMA node of a worker, for that worker to ask from within a task: the node that it is held
// to, or, for the calling thread (worker 0) and workers that are not held, where it runs now.
int worker_node(int worker);

}  // namespace kt
