// quantize_rows in plain C++: the reference that the other files must equal bit for bit.
#include <bit>
#include <cassert>
#include <cstring>
#include <limits>

#include "../float_types.h"
#include "../isa.h"
#include "quantize.h"

namespace kt {
namespace {

constexpr uint32_t magnitude_mask = 0x7fffffffu;
constexpr uint32_t infinity_bits = 0x7f800000u;
constexpr float round_magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer

template <float_type type>
void quantize_row(const void* x, int64_t k, int64_t k_padded, int8_t* q, float* scale,
                  int32_t* sum) {
  uint32_t amax_bits = 0;
  for (int64_t i = 0; i < k; ++i) {
    const uint32_t bits = std::bit_cast<uint32_t>(load_float(x, type, i)) & magnitude_mask;
    amax_bits = bits > amax_bits ? bits : amax_bits;
  }
  const float amax = std::bit_cast<float>(amax_bits);
  const bool finite = amax_bits < infinity_bits;
  *sum = 0;
  if (!finite || amax < quantize_amax_floor) {
    std::memset(q, 0, static_cast<size_t>(k_padded));
    *scale = finite ? 0.0f : std::numeric_limits<float>::quiet_NaN();
    return;
  }
  const float inverse = static_cast<float>(quantize_limit) / amax;
  int32_t total = 0;
  for (int64_t i = 0; i < k; ++i) {
    const float shifted = load_float(x, type, i) * inverse + round_magic;
    const int32_t value = std::bit_cast<int32_t>(shifted) - std::bit_cast<int32_t>(round_magic);
    q[i] = static_cast<int8_t>(value);
    total += value;
  }
  std::memset(q + k, 0, static_cast<size_t>(k_padded - k));
  *scale = amax / static_cast<float>(quantize_limit);
  *sum = total;
}

template <float_type type>
void quantize_all(const quantize_rows_args& args) {
  const char* x = static_cast<const char*>(args.x);
  const int64_t row_bytes = args.x_stride * float_type_size(type);
  for (int64_t row = 0; row < args.rows; ++row) {
    quantize_row<type>(x + row * row_bytes, args.k, args.k_padded, args.q + row * args.k_padded,
                       args.scale + row, args.sum + row);
  }
}

void quantize_column(const quantize_pairs_args& args, int64_t j) {
  const auto value = [&](int64_t i) {
    if (args.factor) {
      return static_cast<const float*>(args.x)[i * args.columns + j] * args.factor[i];
    }
    const int64_t index = (i / 2 * args.columns + j) * 2 + i % 2;
    return bf16_to_float(static_cast<const uint16_t*>(args.x)[index]);
  };
  uint32_t amax_bits = 0;
  for (int64_t i = 0; i < args.k; ++i) {
    const uint32_t bits = std::bit_cast<uint32_t>(value(i)) & magnitude_mask;
    amax_bits = bits > amax_bits ? bits : amax_bits;
  }
  const float amax = std::bit_cast<float>(amax_bits);
  const bool finite = amax_bits < infinity_bits, zero = amax < quantize_pairs_floor;
  for (int64_t i = 0; i < args.k; ++i) {
    uint16_t* const q = args.q + (i / 2 * args.columns + j) * 2 + i % 2;
    if (!finite || zero) {
      *q = 0;
      continue;
    }
    const float shifted = value(i) * (quantize_pairs_limit / amax) + round_magic;
    *q = static_cast<uint16_t>(std::bit_cast<int32_t>(shifted) -
                               std::bit_cast<int32_t>(round_magic));
  }
  args.scale[j] = zero     ? 0.0f
                  : finite ? amax / quantize_pairs_limit
                           : std::numeric_limits<float>::quiet_NaN();
}

}  // namespace

void quantize_rows_portable(const quantize_rows_args& args) {
  record_run(operation::quantize_rows, isa::portable);
  assert(args.k_padded % 64 == 0 && args.k <= args.k_padded);
  switch (args.type) {
    case float_type::bf16:
      return quantize_all<float_type::bf16>(args);
    case float_type::fp16:
      return quantize_all<float_type::fp16>(args);
    case float_type::fp32:
      return quantize_all<float_type::fp32>(args);
  }
}

void quantize_pairs_portable(const quantize_pairs_args& args) {
  record_run(operation::quantize_pairs, isa::portable);
  assert(args.k % 2 == 0 && args.columns % 8 == 0);
  for (int64_t j = 0; j < args.columns; ++j) quantize_column(args, j);
}

void sum_groups_portable(const sum_groups_args& args) {
  record_run(operation::sum_groups, isa::portable);
  const int64_t groups = args.rows * (args.k / args.group_size);
  for (int64_t g = 0; g < groups; ++g) {
    int32_t sum = 0;
    for (int64_t i = 0; i < args.group_size; ++i) sum += args.q[g * args.group_size + i];
    args.sum[g] = sum;
  }
}

}  // namespace kt
