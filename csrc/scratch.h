// Memory for the intermediates of layers, kept and reused: decode allocates nothing once warm.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "experts/routing.h"
#include "mla/absorbed_plan.h"
#include "weights/rows.h"

namespace kt {

// Grows, never shrinks, and does not keep its contents when it grows.
template <typename element>
class buffer {
 public:
  element* reserve(int64_t count) {
    if (count > capacity_) {
      data_.reset();
      capacity_ = 0;  // should there be no memory
      data_.reset(new element[static_cast<size_t>(count)]);
      capacity_ = count;
    }
    return data_.get();
  }

  int64_t bytes() const { return capacity_ * static_cast<int64_t>(sizeof(element)); }

 private:
  std::unique_ptr<element[]> data_;
  int64_t capacity_ = 0;
};

// Room for rows of activations in the form that a weight format takes.
struct row_scratch {
  buffer<char> values;
  buffer<float> scale;
  buffer<int32_t> row_sum, group_sum;

  activation_rows reserve(weight_format format, int64_t rows, int64_t k) {
    return {values.reserve(rows * row_bytes(format, k)), scale.reserve(rows), row_sum.reserve(rows),
            group_sum.reserve(rows * row_groups(format, k))};
  }

  int64_t bytes() const {
    return values.bytes() + scale.bytes() + row_sum.bytes() + group_sum.bytes();
  }
};

struct scratch {
  routing routed;
  row_scratch x;
  buffer<float> h;
  row_scratch h_prepared;
  buffer<std::atomic<int64_t>> slices_left;
  buffer<float> tiles;
  absorbed_plan absorbed;
  buffer<char> attention;
  buffer<char> decoder;

  int64_t bytes() const;
};

// Bytes of all scratches, as of the calls that have returned.
int64_t scratch_bytes();

// A decoder layer holds a scratch while its steps use another. Of one kind they would change places
// from call to call, and each would grow to what both need.
enum class scratch_of : uint8_t { step, decoder_layer };

// One scratch for the duration of a call: as many exist as calls have run at the same time.
class borrowed_scratch {
 public:
  explicit borrowed_scratch(scratch_of of = scratch_of::step);
  ~borrowed_scratch();
  borrowed_scratch(const borrowed_scratch&) = delete;
  borrowed_scratch& operator=(const borrowed_scratch&) = delete;
  scratch* operator->() const { return scratch_; }

 private:
  scratch_of of_;
  scratch* scratch_;
  int64_t bytes_before_;
};

}  // namespace kt
