// The CPU quota of this process's cgroups, versions 1 and 2.
#include <fstream>
#include <string>

#include "topology.h"

namespace kt {
namespace {

constexpr double no_quota = 1e9;

// Processors that one cgroup directory grants, from version 2's cpu.max ("max 100000" or
// "150000 100000") or version 1's cpu.cfs_quota_us ("-1" for none) and cpu.cfs_period_us.
double quota_of(const std::string& directory) {
  double quota = 0, period = 0;
  std::ifstream v2(directory + "/cpu.max");
  if (v2 >> quota >> period && period > 0) return quota / period;
  std::ifstream v1_quota(directory + "/cpu.cfs_quota_us");
  std::ifstream v1_period(directory + "/cpu.cfs_period_us");
  if (v1_quota >> quota && v1_period >> period && quota > 0 && period > 0) return quota / period;
  return no_quota;
}

}  // namespace

// The smallest on the way from this process's cgroup to the root of each hierarchy.
double cpu_quota(const std::string& root) {
  double smallest = no_quota;
  std::ifstream cgroups(root + "/proc/self/cgroup");
  for (std::string line; std::getline(cgroups, line);) {  // "hierarchy:controllers:path"
    const size_t first = line.find(':');
    const size_t second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    std::string path = line.substr(second + 1);
    std::string hierarchy = root + "/sys/fs/cgroup";
    if (!controllers.empty()) {
      if (("," + controllers + ",").find(",cpu,") == std::string::npos) continue;
      hierarchy += "/" + controllers;
    }
    for (;;) {
      const double quota = quota_of(hierarchy + path);
      smallest = quota < smallest ? quota : smallest;
      const size_t slash = path.rfind('/');
      if (slash == std::string::npos) break;
      path.erase(slash);
    }
  }
  return smallest;
}

}  // namespace kt
