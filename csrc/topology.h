// What this process may use of the machine: physical cores, NUMA nodes, processor time.
//
// Read from files under `root`/sys and `root`/proc; tests pretend machines with a root of their
// own. What is missing there (a container without /sys, another system) is no error: every CPU is
// then a core, and all memory is node 0. The memory policy alone is asked of the system.
#pragma once

#include <string>
#include <vector>

namespace kt {

// A physical core with at least one CPU that is online and in the affinity mask of the calling
// thread.
struct core {
  int node;
  std::vector<int> cpus;  // those, ascending; empty where the mask is not known

  bool operator==(const core&) const = default;
};

struct topology {
  std::vector<core> cores;  // by node, then by first CPU; at least one
  // With memory that this process may use, by its cgroup and by the memory policy of the calling
  // thread (numactl --membind and its like); ascending, at least one.
  std::vector<int> memory_nodes;
  int threads;  // for who does not say: the cores, capped by the CPU quota
};

topology read_topology(const std::string& root = {});

// Where a thread of a job belongs.
struct placement {
  int node;
  std::vector<int> cpus;  // it may run on these; empty: anywhere
};

// Places the threads of a job; the first is the calling thread, which is on `caller_cpu` (any
// number that is no CPU: nobody knows).
//
// Nodes take turns, beginning with the caller's: fewer threads than cores still use every node's
// memory channels, and every node has threads for the weights that it holds. Within a node the
// caller's core is the first, so that no other thread is given it.
//
// A job with as many threads as there are cores gives each thread a core. Any other is held to
// nodes only. With fewer threads, it is the system that knows which cores are free: two processes
// that each chose half of them would choose the same half. With more, it balances better than a
// fixed choice.
std::vector<placement> place_threads(const topology& machine, int threads, int caller_cpu);

// Processors' worth of time that the cgroups of this process grant, or a very large number.
double cpu_quota(const std::string& root);

}  // namespace kt
