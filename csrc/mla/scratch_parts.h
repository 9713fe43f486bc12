// Cuts one piece of scratch memory into aligned arrays.
#pragma once

#include <cstdint>

namespace kt {

constexpr uintptr_t cut_alignment = 64;

// Over nullptr it counts bytes; the same calls over that many, and cut_alignment, hand them out.
class memory_cutter {
 public:
  explicit memory_cutter(char* begin) : next_(reinterpret_cast<uintptr_t>(begin)) { align(); }

  template <typename element>
  element* cut(int64_t count) {
    element* const here = reinterpret_cast<element*>(next_);
    next_ += static_cast<uintptr_t>(count) * sizeof(element);
    align();
    return here;
  }

  uintptr_t end() const { return next_; }

 private:
  void align() { next_ = (next_ + cut_alignment - 1) / cut_alignment * cut_alignment; }

  uintptr_t next_;
};

}  // namespace kt
