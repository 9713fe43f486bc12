// The standalone handle: engine/queue.h for Python, and for callers who have no Python at all.
// Signatures and documentation are in ktransformers/_native.pyi.
#include "module_engine.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/unique_ptr.h>

#include <algorithm>
#include <chrono>
#include <deque>
#include <exception>
#include <memory>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "binding.h"
#include "engine/queue.h"
#include "module_layers.h"
#include "numa_memory.h"
#include "released_gil.h"
#include "tensor_view.h"
#include "weights/pack_stacks.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace kt {
namespace {

// How long Ctrl-C may go unheard: nothing wakes a waiting thread up for it.
constexpr std::chrono::milliseconds signal_interval{50};

// Work that can be handed in, with all that it refers to. Its address is what a host callback gets.
class request {
 public:
  request(std::shared_ptr<queue> on, nb::object layer, nb::object hidden_states,
          nb::object top_k_index, nb::object top_k_weights, nb::object out, nb::object done)
      : queue_(std::move(on)),
        layer_(std::move(layer)),
        tensors_{hidden_states, top_k_index, top_k_weights, out, done},
        call_(view_experts_call(layer_, hidden_states, top_k_index, top_k_weights, out)),
        done_(done.is_none()
                  ? nullptr
                  : static_cast<uint32_t*>(view_tensor(done, "done", {element::int32}, {1}).data)) {
  }
  ~request() {
    queue_->drop(this, "a host function was freed before the sync: its work was dropped");
  }
  request(const request&) = delete;
  request& operator=(const request&) = delete;

  // Returns the job's number.
  int64_t submit() noexcept {
    return queue_->submit({call_.input.routed.tokens, call_.step,
                           [](const void* self, int64_t begin, int64_t count) {
                             const request& of = *static_cast<const request*>(self);
                             if (begin == 0) check_indices(of.call_);
                             compute(of.call_, begin, count);
                           },
                           this, done_});
  }

  queue& on() const { return *queue_; }

 private:
  const std::shared_ptr<queue> queue_;
  const nb::object layer_;
  const nb::object tensors_[5];
  const experts_call call_;
  uint32_t* const done_;
};

// What `cudaLaunchHostFunc` and its like call, on threads of which Python knows nothing.
void submit_callback(void* arguments) noexcept { static_cast<request*>(arguments)->submit(); }

void sync_callback(void* arguments) noexcept {
  queue& on = static_cast<request*>(arguments)->on();
  on.wait(on.submitted());
}

template <void (*callback)(void*) noexcept>
uintptr_t address_of(const request&) {
  return reinterpret_cast<uintptr_t>(callback);
}

class experts_handle {
 public:
  explicit experts_handle(nb::object layer)
      : queue_(std::make_shared<queue>()), layer_(std::move(layer)) {
    if (!is_experts(layer_)) throw nb::type_error("layer: expected an Experts");
  }
  experts_handle(const experts_handle&) = delete;
  experts_handle& operator=(const experts_handle&) = delete;

  void submit(nb::object hidden_states, nb::object top_k_index, nb::object top_k_weights,
              nb::object out) {
    requests_.push_back(
        {host_function(hidden_states, top_k_index, top_k_weights, out, nb::none()), 0});
    requests_.back().number = requests_.back().of->submit();
    free_ended();
  }

  // Returns when all that was handed in before has ended. Ctrl-C ends the wait, not the work.
  void sync() {
    check_fork();
    const int64_t count = queue_->submitted();
    for (bool ended = false; !ended;) {
      {
        const released_gil release;
        ended = queue_->wait_for(count, signal_interval);
      }
      if (!ended && PyErr_CheckSignals() != 0) throw nb::python_error();
    }
    free_ended();
    if (const std::exception_ptr error = queue_->take_error()) std::rethrow_exception(error);
  }

  std::unique_ptr<request> host_function(nb::object hidden_states, nb::object top_k_index,
                                         nb::object top_k_weights, nb::object out,
                                         nb::object done) {
    check_fork();
    return std::make_unique<request>(queue_, layer_, std::move(hidden_states),
                                     std::move(top_k_index), std::move(top_k_weights),
                                     std::move(out), std::move(done));
  }

  nb::object layer() const { return layer_; }

 private:
  void check_fork() const {
    if (!queue_->lost_in_fork()) return;
    throw std::runtime_error(
        "this handle was made before a fork and works in the parent only: load one here");
  }

  // One by one and out of the list: freeing a tensor may run Python, which may come back here.
  void free_ended() {
    const int64_t ended = queue_->ended();
    while (!requests_.empty() && requests_.front().number <= ended) {
      const submitted first = std::move(requests_.front());
      requests_.pop_front();
    }
  }

  struct submitted {
    std::unique_ptr<request> of;
    int64_t number;
  };

  const std::shared_ptr<queue> queue_;
  const nb::object layer_;
  std::deque<submitted> requests_;  // in flight
};

using array = nb::ndarray<nb::array_api, nb::c_contig>;

// Zeros, in huge pages where the system has them.
array new_array(const std::vector<size_t>& shape, nb::dlpack::dtype type) {
  int64_t bytes = type.bits / 8;
  for (size_t size : shape) bytes *= static_cast<int64_t>(size);
  auto memory = std::make_unique<numa_buffer>(bytes);
  if (!memory->data() && bytes > 0) throw std::bad_alloc();
  void* const data = memory->data();
  const nb::capsule owner(memory.release(),
                          [](void* buffer) noexcept { delete static_cast<numa_buffer*>(buffer); });
  return array(data, shape.size(), shape.data(), owner, nullptr, type);
}

// What the class Experts takes, by name.
nb::dict pack_experts(nb::handle gate_proj, nb::handle up_proj, nb::handle down_proj,
                      const std::string& name, std::optional<int> wanted_threads) {
  const weight_format format = find_format(name);
  const int threads = checked_threads(wanted_threads);
  const auto view = [](nb::handle tensor, const char* tensor_name, int64_t e, int64_t n,
                       int64_t k) {
    return view_tensor(tensor, tensor_name, {element::bf16, element::fp16, element::fp32},
                       {e, n, k}, access::read);
  };
  const tensor_view gate = view(gate_proj, "gate_proj", any_size, any_size, any_size);
  const int64_t count = gate.shape[0], f = gate.shape[1], d = gate.shape[2];
  check_size("num_experts", count, int64_t{1} << 20);
  check_size("hidden_size", d, gemm_max_k);
  check_size("moe_intermediate_size", f, gemm_max_k);
  const tensor_view up = view(up_proj, "up_proj", count, f, d);
  const tensor_view down = view(down_proj, "down_proj", count, d, f);

  const size_t e = static_cast<size_t>(count);
  const int64_t wide = packed_bytes(format, f, d), scales = scale_count(format, f, d);
  const int64_t down_wide = packed_bytes(format, d, f), down_scales = scale_count(format, d, f);
  const nb::dlpack::dtype bytes = nb::dtype<uint8_t>();
  const nb::dlpack::dtype scale =
      scale_element(format) == element::bf16
          ? nb::dlpack::dtype{static_cast<uint8_t>(nb::dlpack::dtype_code::Bfloat), 16, 1}
          : nb::dtype<float>();
  const array gate_up_packed = new_array({e, 2 * static_cast<size_t>(wide)}, bytes);
  const array gate_up_scales = new_array({e, 2, static_cast<size_t>(scales)}, scale);
  const array down_packed = new_array({e, static_cast<size_t>(down_wide)}, bytes);
  const array down_scale = new_array({e, static_cast<size_t>(down_scales)}, scale);
  char* const gate_up = static_cast<char*>(gate_up_packed.data());
  char* const gate_up_scale = static_cast<char*>(gate_up_scales.data());
  const int64_t scale_bytes = scales * scale_size(format);
  const matrix_stack stacks[] = {
      {gate.data, as_float_type(gate.type), f, d, gate_up, 2 * wide, gate_up_scale,
       2 * scale_bytes},
      {up.data, as_float_type(up.type), f, d, gate_up + wide, 2 * wide, gate_up_scale + scale_bytes,
       2 * scale_bytes},
      {down.data, as_float_type(down.type), d, f, static_cast<char*>(down_packed.data()), down_wide,
       static_cast<char*>(down_scale.data()), down_scales * scale_size(format)},
  };
  constexpr const char* names[] = {"gate_proj", "up_proj", "down_proj"};
  const kernel_table kernels = select_kernels(chosen_isa({}));
  std::vector<non_finite> found(static_cast<size_t>(3 * threads));
  for (int64_t begin = 0; begin < count; begin += threads) {
    const int64_t end = std::min(begin + threads, count);
    {
      const released_gil release;
      pack_stacks(kernels, format, stacks, 3, begin, end, threads, found.data());
    }
    for (int64_t i = 0; i < 3 * (end - begin); ++i) {
      const non_finite& one = found[static_cast<size_t>(i)];
      if (one.count == 0) continue;
      value_error(std::string(names[i % 3]) + " of expert " + std::to_string(begin + i / 3) +
                  " holds " + std::to_string(one.count) +
                  " values that are not finite, the first at [" + std::to_string(one.row) + ", " +
                  std::to_string(one.column) + "]");
    }
    if (PyErr_CheckSignals() != 0) throw nb::python_error();
  }
  nb::dict made;
  made["gate_up_packed"] = gate_up_packed;
  made["gate_up_scale"] = gate_up_scales;
  made["down_packed"] = down_packed;
  made["down_scale"] = down_scale;
  made["format"] = name;
  made["hidden_size"] = d;
  made["moe_intermediate_size"] = f;
  return made;
}

}  // namespace

void bind_engine(nb::module_& m) {
  // Called when other threads have been parked: none is left to hear that its work was dropped.
  nb::module_::import_("atexit").attr("register")(nb::cpp_function(&close_queues));
  m.def("pack_experts", &pack_experts, "gate_proj"_a, "up_proj"_a, "down_proj"_a, "format"_a,
        nb::kw_only(), "threads"_a = nb::none());
  nb::class_<request>(m, "HostFunction")
      .def_prop_ro("submit", &address_of<submit_callback>)
      .def_prop_ro("sync", &address_of<sync_callback>)
      .def_prop_ro("arguments",
                   [](const request& self) { return reinterpret_cast<uintptr_t>(&self); });
  nb::class_<experts_handle>(m, "ExpertsHandle")
      .def(nb::init<nb::object>(), "layer"_a)
      .def("submit", &experts_handle::submit, "hidden_states"_a, "top_k_index"_a, "top_k_weights"_a,
           "out"_a)
      .def("sync", &experts_handle::sync)
      .def("host_function", &experts_handle::host_function, "hidden_states"_a, "top_k_index"_a,
           "top_k_weights"_a, "out"_a, "done"_a = nb::none())
      .def_prop_ro("layer", &experts_handle::layer);
}

}  // namespace kt
