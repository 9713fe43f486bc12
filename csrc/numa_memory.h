// Where the packed weights of a layer lie on a machine with several NUMA nodes.
//
// A weight is `matrices` packed matrices of one shape, one per expert, or two where gate and up are
// stored together. Outputs come in panels of 32 that are contiguous in every packed layout, so any
// whole number of panels is one range of bytes in each matrix. A plan cuts the weight into parts;
// each part is memory of its own, [matrices][outputs of the part][output_bytes]:
//
//   interleave  one part, its pages dealt to the nodes in turn (2 MiB at a time where they are
//   huge) shard       a part per node with the node's slice of the outputs of every matrix
//   replicate   a part per node with everything
//
// Memory of their own keeps two nodes from sharing a page, whatever the sizes.
#pragma once

#include <cstdint>
#include <vector>

#include "topology.h"

namespace kt {

enum class numa_mode : uint8_t { interleave, shard, replicate };

constexpr int64_t numa_panel_outputs = 32;
constexpr int max_numa_nodes = 1024;  // the most that Linux is built for

struct numa_weight {
  int64_t matrices;
  int64_t outputs;       // of one matrix, a multiple of 32
  int64_t output_bytes;  // of one output's weights: k for int8, k padded
};

struct numa_part {
  std::vector<int> nodes;  // one, or those that its pages are dealt to
  int64_t first_output;    // of every matrix
  int64_t outputs;         // may be 0: fewer panels than nodes
  int64_t bytes;
};

// The nodes that a mode uses: all with memory to interleave over; else those that have cores of
// this process too, for a slice or a copy is read by the cores beside it.
std::vector<int> numa_nodes(const topology& machine, numa_mode mode);

// `nodes` is not empty. Slices of a shard differ by one panel at most.
std::vector<numa_part> plan_numa(numa_mode mode, const std::vector<int>& nodes,
                                 const numa_weight& weight);

// Bytes in whole pages: what a part takes.
int64_t whole_pages(int64_t bytes);

// Asks that pages of [address, address + bytes) that do not exist yet come from these nodes, whole
// pages: from the one, where it has any left, or from several in turn. Returns 0 or an errno value.
//
// One node is preferred, not required: a node that has run full costs speed, where a strict binding
// would have the kernel kill the process.
int bind_pages(void* address, int64_t bytes, const std::vector<int>& nodes);

// Owns anonymous memory: zeros, in huge pages where the system has them. No page exists before it
// is written to.
class numa_buffer {
 public:
  explicit numa_buffer(int64_t bytes);  // data() is nullptr where there is no memory
  ~numa_buffer();
  numa_buffer(const numa_buffer&) = delete;
  numa_buffer& operator=(const numa_buffer&) = delete;

  void* data() const { return data_; }
  int64_t bytes() const { return bytes_; }  // whole pages

 private:
  void* data_ = nullptr;
  int64_t bytes_;
};

}  // namespace kt
