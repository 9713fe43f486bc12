// A lock-free list of idle scratches.
//
// A spin lock or a mutex could be held by another thread at the moment of a fork and never be
// released in the child; a list of atomic slots cannot.
#include "scratch.h"

namespace kt {
namespace {

constexpr int slots = 64;  // more calls than this at a time allocate and free
std::atomic<scratch*> idle_scratches[2][slots];
std::atomic<int64_t> total_bytes{0};

template <typename element>
int64_t bytes_of(const std::vector<element>& values) {
  return static_cast<int64_t>(values.capacity() * sizeof(element));
}

scratch* take(std::atomic<scratch*> (&idle)[slots]) {
  for (std::atomic<scratch*>& slot : idle) {
    if (slot.load(std::memory_order_relaxed) == nullptr) continue;
    scratch* const taken = slot.exchange(nullptr, std::memory_order_acquire);
    if (taken) return taken;
  }
  return new scratch;
}

}  // namespace

int64_t scratch::bytes() const {
  return bytes_of(routed.token) + bytes_of(routed.weight) + bytes_of(routed.blocks) +
         bytes_of(routed.expert_begin) + x.bytes() + h.bytes() + h_prepared.bytes() +
         slices_left.bytes() + tiles.bytes() + bytes_of(absorbed.sequences) +
         bytes_of(absorbed.tasks) + attention.bytes() + decoder.bytes();
}

int64_t scratch_bytes() { return total_bytes.load(std::memory_order_relaxed); }

borrowed_scratch::borrowed_scratch(scratch_of of)
    : of_(of),
      scratch_(take(idle_scratches[static_cast<int>(of)])),
      bytes_before_(scratch_->bytes()) {}

borrowed_scratch::~borrowed_scratch() {
  total_bytes.fetch_add(scratch_->bytes() - bytes_before_, std::memory_order_relaxed);
  for (std::atomic<scratch*>& slot : idle_scratches[static_cast<int>(of_)]) {
    scratch* empty = nullptr;
    if (slot.compare_exchange_strong(empty, scratch_, std::memory_order_release)) return;
  }
  total_bytes.fetch_sub(scratch_->bytes(), std::memory_order_relaxed);
  delete scratch_;
}

}  // namespace kt
