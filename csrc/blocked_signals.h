// Signals belong to the caller's threads: those of our own start under this.
#pragma once

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#include <signal.h>
#endif

namespace kt {

// While it lives the calling thread blocks every signal but those of faults, and so do for good the
// threads that it starts. A fault is a thread's own: blocked, it would end the process before any
// handler ran.
class blocked_signals {
 public:
#if defined(__unix__) || defined(__APPLE__)
  blocked_signals() {
    sigset_t all;
    sigfillset(&all);
    for (int fault : {SIGILL, SIGSEGV, SIGBUS, SIGFPE, SIGTRAP, SIGSYS}) sigdelset(&all, fault);
    pthread_sigmask(SIG_SETMASK, &all, &before_);
  }
  ~blocked_signals() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }
#else
  blocked_signals() {}
#endif
  blocked_signals(const blocked_signals&) = delete;
  blocked_signals& operator=(const blocked_signals&) = delete;

 private:
#if defined(__unix__) || defined(__APPLE__)
  sigset_t before_;
#endif
};

}  // namespace kt
