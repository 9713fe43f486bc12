// Reads the topology from Linux's files and places threads on it.
#include "topology.h"

#include <algorithm>
#include <charconv>
#include <filesystem>
#include <fstream>
#include <map>
#include <optional>
#include <thread>
#include <utility>

#include "numa_memory.h"
#include "thread_pool.h"

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace kt {
namespace {

// Above any CPU or node number that Linux is built for: keeps a damaged file from costing memory.
constexpr int max_id = 1 << 16;

// "0-3,8,10-11": the format of every list of CPUs and nodes. Stops where the text is none.
std::vector<int> parse_list(const std::string& text) {
  std::vector<int> ids;
  const char* at = text.data();
  const char* const end = at + text.size();
  while (at < end && (*at == ' ' || *at == '\t')) ++at;
  for (int first, last; at < end; ++at) {
    const auto read = std::from_chars(at, end, first);
    if (read.ec != std::errc()) break;
    at = read.ptr;
    last = first;
    if (at < end && *at == '-') {
      const auto read_last = std::from_chars(at + 1, end, last);
      if (read_last.ec != std::errc()) break;
      at = read_last.ptr;
    }
    for (int id = first; id <= last && id < max_id; ++id) ids.push_back(id);
    if (at < end && *at != ',') break;
  }
  return ids;
}

using id_list = std::optional<std::vector<int>>;

id_list read_list(const std::string& path) {
  std::ifstream file(path);
  std::string line;
  if (!file) return {};
  std::getline(file, line);
  return parse_list(line);
}

// A list among the "Name:<tab>value" lines of /proc/thread-self/status.
id_list read_status(const std::string& root, const std::string& name) {
  std::ifstream file(root + "/proc/thread-self/status");
  for (std::string line; std::getline(file, line);) {
    if (line.starts_with(name + ":")) return parse_list(line.substr(name.size() + 1));
  }
  return {};
}

bool contains(const std::vector<int>& ids, int id) {
  return std::find(ids.begin(), ids.end(), id) != ids.end();
}

std::vector<int> intersection(const std::vector<int>& ids, const id_list& with) {
  std::vector<int> both;
  for (int id : ids) {
    if (!with || contains(*with, id)) both.push_back(id);
  }
  return both;
}

// Node number -> its CPUs. Numbers may have gaps.
std::map<int, std::vector<int>> read_nodes(const std::string& folder) {
  std::map<int, std::vector<int>> nodes;
  std::error_code error;
  for (std::filesystem::directory_iterator entry(folder, error), end; !error && entry != end;
       entry.increment(error)) {
    const std::string name = entry->path().filename().string();
    if (!name.starts_with("node")) continue;
    const std::vector<int> number = parse_list(name.substr(4));
    if (number.size() != 1 || name != "node" + std::to_string(number[0])) continue;
    nodes[number[0]] = read_list(folder + "/" + name + "/cpulist").value_or(std::vector<int>{});
  }
  return nodes;
}

// The nodes that the calling thread's memory policy names (numactl -m, -i, -p); none by default.
id_list policy_nodes() {
#if defined(__linux__)
  constexpr int word_bits = 8 * sizeof(unsigned long);
  unsigned long mask[max_numa_nodes / word_bits] = {};
  int mode;
  if (syscall(SYS_get_mempolicy, &mode, mask, max_numa_nodes, nullptr, 0) != 0) return {};
  std::vector<int> ids;
  for (int node = 0; node < max_numa_nodes; ++node) {
    if (mask[node / word_bits] >> (node % word_bits) & 1) ids.push_back(node);
  }
  if (!ids.empty()) return ids;
#endif
  return {};
}

std::vector<int> read_memory_nodes(const std::string& root,
                                   const std::map<int, std::vector<int>>& nodes) {
  std::vector<int> ids;
  for (const auto& node : nodes) ids.push_back(node.first);
  ids = intersection(ids, read_list(root + "/sys/devices/system/node/has_memory"));
  ids = intersection(ids, read_status(root, "Mems_allowed_list"));
  ids = intersection(ids, policy_nodes());
  return ids.empty() ? std::vector<int>{0} : ids;
}

std::vector<core> read_cores(const std::string& root, const std::map<int, std::vector<int>>& nodes,
                             int fallback_node) {
  const std::string folder = root + "/sys/devices/system/cpu";
  const id_list allowed = read_status(root, "Cpus_allowed_list");
  std::vector<int> cpus;
  if (allowed) cpus = intersection(*allowed, read_list(folder + "/online"));
  if (cpus.empty()) {
    const size_t count = std::max(1u, std::thread::hardware_concurrency());
    return std::vector<core>(count, {fallback_node, {}});
  }
  // CPU numbers are the machine's, so a core's lowest one names it, whatever its socket.
  std::map<int, core> by_first_sibling;
  for (int cpu : cpus) {
    const std::string topology = folder + "/cpu" + std::to_string(cpu) + "/topology/";
    id_list siblings = read_list(topology + "core_cpus_list");
    if (!siblings) siblings = read_list(topology + "thread_siblings_list");  // before Linux 5.3
    const int name = siblings && !siblings->empty() ? siblings->front() : cpu;
    int home = fallback_node;
    for (const auto& [node, its_cpus] : nodes) {
      if (contains(its_cpus, cpu)) home = node;
    }
    core& found = by_first_sibling.try_emplace(name, core{home, {}}).first->second;
    found.cpus.push_back(cpu);
  }
  std::vector<core> cores;
  for (auto& [name, found] : by_first_sibling) cores.push_back(std::move(found));
  std::stable_sort(cores.begin(), cores.end(),
                   [](const core& a, const core& b) { return a.node < b.node; });
  return cores;
}

// The cores in the order in which threads take them.
std::vector<const core*> taking_turns(const std::vector<core>& cores, int caller_cpu) {
  const auto is_callers = [&](const core* one) { return contains(one->cpus, caller_cpu); };
  std::vector<std::vector<const core*>> nodes;
  for (const core& one : cores) {
    if (nodes.empty() || nodes.back().front()->node != one.node) nodes.emplace_back();
    nodes.back().push_back(&one);
  }
  for (size_t i = 0; i < nodes.size(); ++i) {
    const auto callers = std::find_if(nodes[i].begin(), nodes[i].end(), is_callers);
    if (callers == nodes[i].end()) continue;
    std::rotate(nodes[i].begin(), callers, callers + 1);
    std::rotate(nodes.begin(), nodes.begin() + static_cast<std::ptrdiff_t>(i), nodes.end());
    break;
  }
  std::vector<const core*> order;
  for (size_t turn = 0; order.size() < cores.size(); ++turn) {
    for (const auto& node : nodes) {
      if (turn < node.size()) order.push_back(node[turn]);
    }
  }
  return order;
}

// Empty where that is all of them: the mask that a thread starts with does it, and follows a
// cgroup.
std::vector<int> cpus_of_node(const topology& machine, int node) {
  std::vector<int> cpus;
  if (machine.cores.front().node == machine.cores.back().node) return cpus;
  for (const core& one : machine.cores) {
    if (one.node == node) cpus.insert(cpus.end(), one.cpus.begin(), one.cpus.end());
  }
  return cpus;
}

}  // namespace

topology read_topology(const std::string& root) {
  const std::map<int, std::vector<int>> nodes = read_nodes(root + "/sys/devices/system/node");
  topology machine;
  machine.memory_nodes = read_memory_nodes(root, nodes);
  machine.cores = read_cores(root, nodes, machine.memory_nodes.front());
  const int cores = static_cast<int>(std::min(machine.cores.size(), size_t{max_threads}));
  const double quota = cpu_quota(root);
  machine.threads = std::max(1, quota < cores ? static_cast<int>(quota) : cores);
  return machine;
}

std::vector<placement> place_threads(const topology& machine, int threads, int caller_cpu) {
  const std::vector<const core*> order = taking_turns(machine.cores, caller_cpu);
  const bool one_each = static_cast<size_t>(threads) == order.size();
  std::vector<placement> places;
  for (size_t i = 0; i < static_cast<size_t>(threads); ++i) {
    const core& its = *order[i % order.size()];
    places.push_back({its.node, one_each ? its.cpus : cpus_of_node(machine, its.node)});
  }
  return places;
}

int default_threads() { return read_topology().threads; }

}  // namespace kt
