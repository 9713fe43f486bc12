// The formats of packed weights, and the sizes that follow from a matrix's.
//
// A format's name is what people write and read: "int8", "int4-128" (groups of 128), "bf16".
// Layouts and scales are defined by <format>_gemm/<format>_gemm.h.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "../gemm.h"

namespace kt {

enum class weight_kind : uint8_t { int8, int4, bf16 };

struct weight_format {
  weight_kind kind;
  int64_t group_size;  // weights along k that share a scale; 0 where the format has no groups

  bool operator==(const weight_format&) const = default;
};

// All formats, and their names.
const std::vector<weight_format>& weight_formats();
std::string format_name(weight_format format);

constexpr int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}
constexpr int64_t padded_n(int64_t n) { return round_up(n, gemm_n_multiple); }
int64_t padded_k(weight_format format, int64_t k);

// Of a matrix with n outputs and k inputs. Outputs from a multiple of 32 on have their bytes and
// their scales back to back, so that the first are those of output j: packed_bytes(format, j, k).
int64_t packed_bytes(weight_format format, int64_t n, int64_t k);
int64_t scale_count(weight_format format, int64_t n, int64_t k);
int64_t scale_size(weight_format format);  // bytes of one: fp32, or bf16 in int4

}  // namespace kt
