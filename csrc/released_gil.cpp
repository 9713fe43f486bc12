// See released_gil.h.
#include "released_gil.h"

#include <atomic>
#include <chrono>
#include <thread>

namespace nb = nanobind;
using namespace nb::literals;

namespace kt {
namespace {

std::atomic<int> threads_inside{0};  // grows only with the GIL, so not behind the handler's back
std::atomic<int> threads_parked{0};
std::atomic<bool> parking{false};
std::thread::id exiting_thread;  // written before `parking`; runs exit handlers that may come yet

[[noreturn]] void park() {
  for (;;) std::this_thread::sleep_for(std::chrono::hours(24));
}

bool to_be_parked() { return parking.load() && std::this_thread::get_id() != exiting_thread; }

void begin_parking() {
  exiting_thread = std::this_thread::get_id();
  parking.store(true);
  {
    const nb::gil_scoped_release release;
    for (int inside; (inside = threads_inside.load()) != 0;) threads_inside.wait(inside);
  }
  // What parked threads refer to is never given back, and no fault of the binding.
  if (threads_parked.load() > 0) nb::set_leak_warnings(false);
}

// They do not exist in the child of a fork, and can't give back what they refer to.
void forget_other_threads() {
  threads_inside.store(0);
  nb::set_leak_warnings(false);
}

}  // namespace

released_gil::released_gil() {
  if (to_be_parked()) {
    nb::set_leak_warnings(false);
    PyEval_SaveThread();
    park();
  }
  threads_inside.fetch_add(1);
  state_ = PyEval_SaveThread();
}

released_gil::~released_gil() {
  const bool parks = to_be_parked();
  if (parks) {
    threads_parked.fetch_add(1);
  } else {
    PyEval_RestoreThread(state_);
  }
  threads_inside.fetch_sub(1);
  threads_inside.notify_all();
  if (parks) park();
}

void park_threads_at_exit() {
  nb::module_::import_("atexit").attr("register")(nb::cpp_function(&begin_parking));
  const nb::module_ os = nb::module_::import_("os");
  if (nb::hasattr(os, "register_at_fork")) {
    os.attr("register_at_fork")("after_in_child"_a = nb::cpp_function(&forget_other_threads));
  }
}

}  // namespace kt
