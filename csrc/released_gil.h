// Gives the GIL up while kernels run.
//
// Python below 3.14 ends a thread that asks for the GIL while the interpreter shuts down, by an
// exception that must not pass through C++ frames that end in noexcept: the process would abort. So
// a daemon thread in a kernel at exit is parked for good instead, as 3.14 does. An exit handler has
// parking begin, then waits, without the GIL, for the threads that have not seen it.
#pragma once

#include <nanobind/nanobind.h>

namespace kt {

class released_gil {
 public:
  released_gil();
  ~released_gil();
  released_gil(const released_gil&) = delete;
  released_gil& operator=(const released_gil&) = delete;

 private:
  PyThreadState* state_;
};

// Registers the exit handler; once, when the module is imported.
void park_threads_at_exit();

}  // namespace kt
