// A lock-free list of idle scratches.
//
// A spin lock or a mutex could be held by another thread at the moment of a fork and never be
// released in the child; a list of atomic slots cannot.
#include "scratch.h"

namespace kt {
namespace {

constexpr int slots = 64;  // more calls than this at a time allocate and free
std::atomic<scratch*> idle[slots];

}  // namespace

borrowed_scratch::borrowed_scratch() : scratch_(nullptr) {
  for (std::atomic<scratch*>& slot : idle) {
    if (slot.load(std::memory_order_relaxed) == nullptr) continue;
    scratch_ = slot.exchange(nullptr, std::memory_order_acquire);
    if (scratch_) return;
  }
  scratch_ = new scratch;
}

borrowed_scratch::~borrowed_scratch() {
  for (std::atomic<scratch*>& slot : idle) {
    scratch* empty = nullptr;
    if (slot.compare_exchange_strong(empty, scratch_, std::memory_order_release)) return;
  }
  delete scratch_;
}

}  // namespace kt
