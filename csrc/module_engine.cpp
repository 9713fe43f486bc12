// The standalone handle: engine/queue.h for Python, and for callers who have no Python at all.
// Signatures and documentation are in ktransformers/_native.pyi.
#include "module_engine.h"

#include <nanobind/stl/optional.h>
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
#include "released_gil.h"
#include "tensor_view.h"

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
          nb::object top_k_index, nb::object top_k_weights, nb::object out, nb::object done,
          nb::object times)
      : queue_(std::move(on)),
        layer_(std::move(layer)),
        tensors_{hidden_states, top_k_index, top_k_weights, out, done, times},
        call_(view_experts_call(layer_, hidden_states, top_k_index, top_k_weights, out)),
        done_(done.is_none()
                  ? nullptr
                  : static_cast<uint32_t*>(view_tensor(done, "done", {element::int32}, {1}).data)),
        times_(times.is_none() ? nullptr
                               : static_cast<int64_t*>(
                                     view_tensor(times, "times", {element::int64}, {2}).data)) {}
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
                           this, done_, times_});
  }

  queue& on() const { return *queue_; }

 private:
  const std::shared_ptr<queue> queue_;
  const nb::object layer_;
  const nb::object tensors_[6];
  const experts_call call_;
  uint32_t* const done_;
  int64_t* const times_;
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
        {host_function(hidden_states, top_k_index, top_k_weights, out, nb::none(), nb::none()), 0});
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
                                         nb::object top_k_weights, nb::object out, nb::object done,
                                         nb::object times) {
    check_fork();
    return std::make_unique<request>(queue_, layer_, std::move(hidden_states),
                                     std::move(top_k_index), std::move(top_k_weights),
                                     std::move(out), std::move(done), std::move(times));
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

}  // namespace

void bind_engine(nb::module_& m) {
  // Called when other threads have been parked: none is left to hear that its work was dropped.
  nb::module_::import_("atexit").attr("register")(nb::cpp_function(&close_queues));
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
           "top_k_weights"_a, "out"_a, "done"_a = nb::none(), "times"_a = nb::none())
      .def_prop_ro("layer", &experts_handle::layer);
}

}  // namespace kt
