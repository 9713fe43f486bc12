// Binds topology.h and numa_memory.h. Signatures and documentation are in
// ktransformers/_native.pyi.
#include "module_numa.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "binding.h"
#include "numa_memory.h"
#include "thread_pool.h"
#include "topology.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace kt {
namespace {

constexpr const char* mode_names[] = {"interleave", "shard", "replicate"};

}  // namespace

numa_mode find_numa_mode(const std::string& wanted) {
  for (numa_mode mode : {numa_mode::interleave, numa_mode::shard, numa_mode::replicate}) {
    if (wanted == mode_names[static_cast<int>(mode)]) return mode;
  }
  value_error("numa='" + wanted + "': expected interleave, shard or replicate");
}

void check_nodes(const std::vector<int>& nodes) {
  if (nodes.empty()) value_error("nodes: expected at least one");
  for (size_t i = 0; i < nodes.size(); ++i) {
    if (nodes[i] < 0 || nodes[i] >= max_numa_nodes) {
      value_error("nodes[" + std::to_string(i) + "] is " + std::to_string(nodes[i]) +
                  ", expected 0 to " + std::to_string(max_numa_nodes - 1));
    }
    if (std::count(nodes.begin(), nodes.end(), nodes[i]) > 1) {
      value_error("nodes: " + std::to_string(nodes[i]) + " is there twice");
    }
  }
}

namespace {

std::string chosen_mode(const std::optional<std::string>& wanted) {
  if (wanted) return mode_names[static_cast<int>(find_numa_mode(*wanted))];
  const char* variable = std::getenv("USE_NUMA");
  const std::string value = variable ? variable : "";
  if (value == "1") return "replicate";
  if (value.empty() || value == "0") return "interleave";
  value_error("USE_NUMA=" + value + ": expected 0 or 1 (which means numa: replicate)");
}

using core_tuple = std::tuple<int, std::vector<int>>;

std::vector<core_tuple> cores_of(const topology& machine) {
  std::vector<core_tuple> cores;
  for (const core& one : machine.cores) cores.emplace_back(one.node, one.cpus);
  return cores;
}

std::vector<core_tuple> places_of(const topology& machine, int threads, int caller_cpu) {
  if (threads < 1 || threads > max_threads) {
    value_error("threads=" + std::to_string(threads) + ": expected 1 to " +
                std::to_string(max_threads));
  }
  std::vector<core_tuple> places;
  for (const placement& one : place_threads(machine, threads, caller_cpu)) {
    places.emplace_back(one.node, one.cpus);
  }
  return places;
}

std::vector<numa_part> bind_plan(const std::string& mode, int64_t matrices, int64_t outputs,
                                 int64_t output_bytes,
                                 const std::optional<std::vector<int>>& nodes) {
  const numa_mode found = find_numa_mode(mode);
  if (nodes) check_nodes(*nodes);
  if (outputs < 1 || outputs % numa_panel_outputs != 0) {
    value_error("outputs=" + std::to_string(outputs) + ": expected a positive multiple of " +
                std::to_string(numa_panel_outputs));
  }
  int64_t bytes;
  if (matrices < 1 || output_bytes < 1 || __builtin_mul_overflow(matrices, outputs, &bytes) ||
      __builtin_mul_overflow(bytes, output_bytes, &bytes)) {
    value_error("matrices=" + std::to_string(matrices) +
                ", output_bytes=" + std::to_string(output_bytes) +
                ": expected at least 1 each, and less than 2^63 bytes in all");
  }
  return plan_numa(found, nodes ? *nodes : numa_nodes(read_topology(), found),
                   {matrices, outputs, output_bytes});
}

[[noreturn]] void bind_error(int error, const numa_part& part) {
  std::string message = std::string("mbind: ") + std::strerror(error) + ": nodes";
  for (int node : part.nodes) message += " " + std::to_string(node);
  if (error == EPERM) message += "; a container needs the capability SYS_NICE (--cap-add SYS_NICE)";
  nb::object raised = nb::borrow(PyExc_OSError)(error, message);
  PyErr_SetObject(PyExc_OSError, raised.ptr());
  throw nb::python_error();
}

nb::ndarray<uint8_t> allocate(const numa_part& part, const nb::object& bind) {
  auto owned = bound_memory(part, bind);
  void* const data = owned->data();
  const nb::capsule owner(owned.release(),
                          [](void* buffer) noexcept { delete static_cast<numa_buffer*>(buffer); });
  return nb::ndarray<uint8_t>(data, {static_cast<size_t>(part.bytes)}, owner, {},
                              nb::dtype<uint8_t>(), nb::device::cpu::value);
}

}  // namespace

std::unique_ptr<numa_buffer> bound_memory(const numa_part& part, const nb::object& bind) {
  auto owned = std::make_unique<numa_buffer>(part.bytes);
  if (part.bytes == 0) return owned;
  if (!owned->data()) throw std::bad_alloc();
  if (!bind.is_none()) {
    bind(reinterpret_cast<uintptr_t>(owned->data()), owned->bytes(), part.nodes);
    return owned;
  }
  const int error = bind_pages(owned->data(), owned->bytes(), part.nodes);
  // Where one node has all the memory, it comes from there whether the system hears us or not.
  if (error != 0 && read_topology().memory_nodes != std::vector{part.nodes.front()}) {
    bind_error(error, part);
  }
  return owned;
}

void bind_numa(nb::module_& m) {
  nb::class_<topology>(m, "Topology")
      .def_prop_ro("cores", &cores_of)
      .def_ro("memory_nodes", &topology::memory_nodes)
      .def_ro("threads", &topology::threads)
      .def(
          "nodes",
          [](const topology& machine, const std::string& mode) {
            return numa_nodes(machine, find_numa_mode(mode));
          },
          "mode"_a)
      .def("place_threads", &places_of, "threads"_a, "caller_cpu"_a = -1);
  m.def("topology", &read_topology, "root"_a = "");
  m.def("numa_mode", &chosen_mode, "wanted"_a = nb::none());
  nb::class_<numa_part>(m, "NumaPart")
      .def_ro("nodes", &numa_part::nodes)
      .def_ro("first_output", &numa_part::first_output)
      .def_ro("outputs", &numa_part::outputs)
      .def_ro("nbytes", &numa_part::bytes)
      .def_prop_ro("allocated", [](const numa_part& part) { return whole_pages(part.bytes); })
      .def("allocate", &allocate, nb::kw_only(), "bind"_a.none() = nb::none());
  m.def("numa_plan", &bind_plan, "mode"_a, nb::kw_only(), "matrices"_a, "outputs"_a,
        "output_bytes"_a, "nodes"_a = nb::none());
}

}  // namespace kt
