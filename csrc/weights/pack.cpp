// Packing of weights: quantises 16 rows at a time and interleaves them.
#include "pack.h"

#include <cmath>
#include <cstring>
#include <vector>

#include "../float_types.h"

namespace kt {
namespace {

non_finite find_non_finite(const void* weight, float_type type, int64_t n, int64_t k) {
  non_finite found{0, 0, 0};
  for (int64_t i = 0; i < n * k; ++i) {
    if (std::isfinite(load_float(weight, type, i))) continue;
    if (found.count++ == 0) {
      found.row = i / k;
      found.column = i % k;
    }
  }
  return found;
}

// What one panel is quantised to before it is interleaved: 16 rows, those beyond n zero.
struct panel {
  std::vector<int8_t> q;        // [16][k padded]
  std::vector<uint16_t> value;  // the same, in bf16
};

// Fills q and 16 scales; false where a weight is not finite.
bool quantize_int8(const kernel_table& kernels, const char* row, float_type type, int64_t rows,
                   int64_t k, int64_t kp, panel* to, float* scale) {
  int32_t sums[panel_outputs];
  std::memset(scale, 0, panel_outputs * sizeof(float));
  kernels.quantize_rows({rows, k, kp, row, k, type, to->q.data(), scale, sums});
  for (int64_t i = 0; i < rows; ++i) {
    if (!std::isfinite(scale[i])) return false;
  }
  return true;
}

// Likewise, with scales [k/group_size][16].
bool quantize_int4(const kernel_table& kernels, const char* row, float_type type, int64_t rows,
                   int64_t k, int64_t kp, int64_t group_size, panel* to, uint16_t* scale) {
  const int64_t groups = kp / group_size;
  std::vector<uint16_t> row_scales(static_cast<size_t>(groups));
  std::memset(scale, 0, static_cast<size_t>(groups * panel_outputs) * sizeof(uint16_t));
  for (int64_t i = 0; i < rows; ++i) {
    int8_t* q = to->q.data() + i * kp;
    std::memset(q, 0, static_cast<size_t>(kp));
    std::fill(row_scales.begin(), row_scales.end(), uint16_t{0});
    kernels.int4_quantize(
        {k, group_size, row + i * k * float_type_size(type), type, q, row_scales.data()});
    for (int64_t g = 0; g < groups; ++g) {
      if (!std::isfinite(bf16_to_float(row_scales[static_cast<size_t>(g)]))) return false;
      scale[g * panel_outputs + i] = row_scales[static_cast<size_t>(g)];
    }
  }
  return true;
}

// Whether all are: without a branch, so that the compiler takes many at a time.
bool are_finite(const uint16_t* bf16, int64_t count) {
  constexpr uint16_t exponent = 0x7f80;
  uint16_t not_finite = 0;
  for (int64_t i = 0; i < count; ++i) not_finite |= (bf16[i] & exponent) == exponent;
  return !not_finite;
}

bool round_bf16(const char* row, float_type type, int64_t rows, int64_t k, int64_t kp, panel* to) {
  for (int64_t i = 0; i < rows; ++i) {
    uint16_t* value = to->value.data() + i * kp;
    if (type == float_type::bf16) {
      std::memcpy(value, row + i * k * 2, static_cast<size_t>(k) * 2);
      if (!are_finite(value, k)) return false;
      continue;
    }
    for (int64_t kk = 0; kk < k; ++kk) {
      const float weight = load_float(row, type, i * k + kk);
      if (!std::isfinite(weight)) return false;
      value[kk] = float_to_bf16(weight);
    }
  }
  return true;
}

// rows [16][bytes] -> [bytes/4][16][4]: int8 in fours, bf16 in pairs
void interleave(const kernel_table& kernels, const void* rows, int64_t bytes, void* packed) {
  const int64_t fours = bytes / 4;
  kernels.transpose_pairs({panel_outputs, fours, static_cast<const uint16_t*>(rows), fours,
                           static_cast<uint16_t*>(packed), panel_outputs});
}

// q [16][k] -> [k/8][16][4], the first four k low, the next four high
void interleave_int4(const int8_t* q, int64_t k, uint8_t* packed) {
  for (int64_t kk = 0; kk < k; kk += 8) {
    for (int64_t j = 0; j < panel_outputs; ++j) {
      const int8_t* eight = q + j * k + kk;
      for (int64_t i = 0; i < 4; ++i) {
        const int low = eight[i] + int4_zero, high = eight[4 + i] + int4_zero;
        *packed++ = static_cast<uint8_t>(low | high << 4);
      }
    }
  }
}

}  // namespace

non_finite pack(const kernel_table& kernels, weight_format format, const void* weight,
                float_type type, int64_t n, int64_t k, void* packed, void* scale) {
  const int64_t kp = padded_k(format, k);
  panel to;
  if (format.kind == weight_kind::bf16) {
    to.value.resize(static_cast<size_t>(panel_outputs * kp));
  } else {
    to.q.resize(static_cast<size_t>(panel_outputs * kp));
  }
  for (int64_t j = 0; j < padded_n(n); j += panel_outputs) {
    const int64_t rows = j >= n ? 0 : (n - j < panel_outputs ? n - j : panel_outputs);
    if (rows < panel_outputs) {
      std::fill(to.q.begin(), to.q.end(), int8_t{0});
      std::fill(to.value.begin(), to.value.end(), uint16_t{0});
    }
    const char* row = static_cast<const char*>(weight) + j * k * float_type_size(type);
    bool finite = true;
    switch (format.kind) {
      case weight_kind::int8:
        finite =
            quantize_int8(kernels, row, type, rows, k, kp, &to, static_cast<float*>(scale) + j);
        interleave(kernels, to.q.data(), kp, static_cast<int8_t*>(packed) + j * kp);
        break;
      case weight_kind::int4:
        finite = quantize_int4(kernels, row, type, rows, k, kp, format.group_size, &to,
                               static_cast<uint16_t*>(scale) + j * (kp / format.group_size));
        interleave_int4(to.q.data(), kp, static_cast<uint8_t*>(packed) + j * kp / 2);
        break;
      case weight_kind::bf16:
        finite = round_bf16(row, type, rows, k, kp, &to);
        interleave(kernels, to.value.data(), 2 * kp, static_cast<uint16_t*>(packed) + j * kp);
        break;
    }
    if (!finite) return find_non_finite(weight, type, n, k);
  }
  return {0, 0, 0};
}

void unpack(weight_format format, const void* packed, int64_t n, int64_t k, void* q) {
  const int64_t kp = padded_k(format, k);
  for (int64_t j = 0; j < n; ++j) {
    const int64_t panel_weights = j / panel_outputs * panel_outputs * kp;
    const int64_t lane = j % panel_outputs;
    for (int64_t kk = 0; kk < k; ++kk) {
      switch (format.kind) {
        case weight_kind::int8:
          static_cast<int8_t*>(q)[j * k + kk] =
              static_cast<const int8_t*>(packed)[panel_weights + kk / 4 * 64 + lane * 4 + kk % 4];
          break;
        case weight_kind::int4: {
          const uint8_t both = static_cast<const uint8_t*>(
              packed)[panel_weights / 2 + kk / 8 * 64 + lane * 4 + kk % 4];
          const int nibble = kk % 8 < 4 ? both & 15 : both >> 4;
          static_cast<int8_t*>(q)[j * k + kk] = static_cast<int8_t>(nibble - int4_zero);
          break;
        }
        case weight_kind::bf16:
          static_cast<uint16_t*>(q)[j * k + kk] =
              static_cast<const uint16_t*>(packed)[panel_weights + kk / 2 * 32 + lane * 2 + kk % 2];
          break;
      }
    }
  }
}

}  // namespace kt
