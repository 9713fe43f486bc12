// Plans, maps and binds the memory of packed weights. See numa_memory.h.
#include "numa_memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <iterator>

#if defined(__linux__)
#include <linux/mempolicy.h>
#include <sys/syscall.h>
#endif

namespace kt {

std::vector<int> numa_nodes(const topology& machine, numa_mode mode) {
  if (mode == numa_mode::interleave) return machine.memory_nodes;
  std::vector<int> nodes;
  std::copy_if(machine.memory_nodes.begin(), machine.memory_nodes.end(), std::back_inserter(nodes),
               [&](int node) {
                 return std::any_of(machine.cores.begin(), machine.cores.end(),
                                    [&](const core& one) { return one.node == node; });
               });
  return nodes.empty() ? machine.memory_nodes : nodes;
}

std::vector<numa_part> plan_numa(numa_mode mode, const std::vector<int>& nodes,
                                 const numa_weight& weight) {
  const int64_t bytes_per_output = weight.matrices * weight.output_bytes;
  std::vector<numa_part> parts;
  if (mode == numa_mode::interleave) {
    parts.push_back({nodes, 0, weight.outputs, bytes_per_output * weight.outputs});
    return parts;
  }
  const int64_t count = static_cast<int64_t>(nodes.size());
  const int64_t panels = weight.outputs / numa_panel_outputs;
  for (int64_t i = 0; i < count; ++i) {
    const bool whole = mode == numa_mode::replicate;
    const int64_t first = whole ? 0 : panels * i / count * numa_panel_outputs;
    const int64_t end = whole ? weight.outputs : panels * (i + 1) / count * numa_panel_outputs;
    parts.push_back(
        {{nodes[static_cast<size_t>(i)]}, first, end - first, bytes_per_output * (end - first)});
  }
  return parts;
}

int64_t whole_pages(int64_t bytes) {
  const int64_t page = sysconf(_SC_PAGESIZE);
  return (bytes + page - 1) / page * page;
}

int bind_pages(void* address, int64_t bytes, const std::vector<int>& nodes) {
#if defined(__linux__)
  constexpr int word_bits = 8 * sizeof(unsigned long);
  unsigned long mask[max_numa_nodes / word_bits] = {};
  for (int node : nodes) mask[node / word_bits] |= 1ul << (node % word_bits);
  const int policy = nodes.size() == 1 ? MPOL_PREFERRED : MPOL_INTERLEAVE;
  // The kernel takes the number of bits plus one. No page exists, so none has to move.
  const long result = syscall(SYS_mbind, address, bytes, policy, mask, max_numa_nodes + 1, 0);
  return result == 0 ? 0 : errno;
#else
  (void)address;
  (void)bytes;
  (void)nodes;
  return ENOSYS;
#endif
}

numa_buffer::numa_buffer(int64_t bytes) : bytes_(whole_pages(bytes)) {
  if (bytes_ == 0) return;
  void* mapped = mmap(nullptr, static_cast<size_t>(bytes_), PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) return;
  data_ = mapped;
#if defined(MADV_HUGEPAGE)
  // A kernel built without huge pages refuses; small ones do too, some percent slower.
  madvise(data_, static_cast<size_t>(bytes_), MADV_HUGEPAGE);
#endif
}

numa_buffer::~numa_buffer() {
  if (data_) munmap(data_, static_cast<size_t>(bytes_));
}

}  // namespace kt
