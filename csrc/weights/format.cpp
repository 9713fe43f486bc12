// Names and sizes of the weight formats.
#include "format.h"

#include "../bf16_gemm/bf16_gemm.h"
#include "../int4_gemm/int4_gemm.h"
#include "../int8_gemm/int8_gemm.h"

namespace kt {

const std::vector<weight_format>& weight_formats() {
  static const std::vector<weight_format> formats = {{weight_kind::int8, 0},
                                                     {weight_kind::int4, 32},
                                                     {weight_kind::int4, 64},
                                                     {weight_kind::int4, 128},
                                                     {weight_kind::bf16, 0}};
  return formats;
}

std::string format_name(weight_format format) {
  switch (format.kind) {
    case weight_kind::int8:
      return "int8";
    case weight_kind::int4:
      return "int4-" + std::to_string(format.group_size);
    case weight_kind::bf16:
      return "bf16";
  }
  return {};
}

int64_t padded_k(weight_format format, int64_t k) {
  switch (format.kind) {
    case weight_kind::int8:
      return round_up(k, int8_gemm_k_multiple);
    case weight_kind::int4:
      return round_up(round_up(k, int4_gemm_k_multiple), format.group_size);
    case weight_kind::bf16:
      return round_up(k, bf16_gemm_k_multiple);
  }
  return 0;
}

int64_t packed_bytes(weight_format format, int64_t n, int64_t k) {
  const int64_t weights = padded_n(n) * padded_k(format, k);
  switch (format.kind) {
    case weight_kind::int8:
      return weights;
    case weight_kind::int4:
      return weights / 2;
    case weight_kind::bf16:
      return weights * 2;
  }
  return 0;
}

int64_t scale_count(weight_format format, int64_t n, int64_t k) {
  switch (format.kind) {
    case weight_kind::int8:
      return padded_n(n);
    case weight_kind::int4:
      return padded_n(n) * (padded_k(format, k) / format.group_size);
    case weight_kind::bf16:
      return 0;
  }
  return 0;
}

int64_t scale_size(weight_format format) { return format.kind == weight_kind::int4 ? 2 : 4; }

}  // namespace kt
