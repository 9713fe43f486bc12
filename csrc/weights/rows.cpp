// Activations in a format's form, and their products with its weights.
#include "rows.h"

#include <cstring>

#include "../float_types.h"

namespace kt {
namespace {

// Below, an AMX tile would be mostly empty. bf16 always takes tiles: a token's bits must not depend
// on how many others there are.
constexpr int64_t tiles_from_rows = 4;

void to_bf16(const kernel_table& kernels, int64_t count, int64_t k, int64_t kp, const void* x,
             int64_t x_stride, float_type type, uint16_t* values) {
  if (type == float_type::fp32) {
    kernels.round_rows(
        {count, k, static_cast<const float*>(x), x_stride, values, kp, float_type::bf16});
  }
  for (int64_t i = 0; i < count; ++i) {
    uint16_t* row = values + i * kp;
    if (type == float_type::bf16) {
      std::memcpy(row, static_cast<const uint16_t*>(x) + i * x_stride,
                  static_cast<size_t>(k) * sizeof(uint16_t));
    }
    std::memset(row + k, 0, static_cast<size_t>(kp - k) * sizeof(uint16_t));
  }
}

}  // namespace

int64_t row_bytes(weight_format format, int64_t k) {
  return padded_k(format, k) * (format.kind == weight_kind::bf16 ? 2 : 1);
}

int64_t row_groups(weight_format format, int64_t k) {
  return format.group_size ? padded_k(format, k) / format.group_size : 0;
}

void prepare_rows(const kernel_table& kernels, weight_format format, int64_t count, int64_t k,
                  const void* x, int64_t x_stride, float_type type, const activation_rows& to,
                  int64_t first) {
  const int64_t kp = padded_k(format, k);
  char* values = to.values + first * row_bytes(format, k);
  if (format.kind == weight_kind::bf16) {
    to_bf16(kernels, count, k, kp, x, x_stride, type, reinterpret_cast<uint16_t*>(values));
    return;
  }
  int8_t* q = reinterpret_cast<int8_t*>(values);
  kernels.quantize_rows({count, k, kp, x, x_stride, type, q, to.scale + first, to.row_sum + first});
  if (format.group_size) {
    kernels.sum_groups(
        {count, kp, format.group_size, q, to.group_sum + first * (kp / format.group_size)});
  }
}

packed_matrix outputs_from(weight_format format, packed_matrix matrix, int64_t output, int64_t k) {
  return {matrix.packed + packed_bytes(format, output, k),
          matrix.scale + scale_count(format, output, k) * scale_size(format)};
}

operation product_of(weight_format format) {
  switch (format.kind) {
    case weight_kind::int8:
      return operation::int8_gemm;
    case weight_kind::int4:
      return operation::int4_gemm;
    case weight_kind::bf16:
      return operation::bf16_gemm;
  }
  return operation::int8_gemm;
}

void multiply(const kernel_table& kernels, weight_format format, int64_t k,
              const activation_rows& a, const product& of) {
  const int64_t groups = row_groups(format, k);
  const gemm_args args{of.m,
                       of.n,
                       padded_k(format, k),
                       of.index,
                       a.values + of.first * row_bytes(format, k),
                       a.scale + of.first,
                       groups ? a.group_sum + of.first * groups : a.row_sum + of.first,
                       of.weights.packed,
                       of.weights.scale,
                       format.group_size,
                       of.c,
                       of.c_stride};
  switch (format.kind) {
    case weight_kind::int8:
      return of.m < tiles_from_rows ? kernels.int8_gemm_few(args) : kernels.int8_gemm(args);
    case weight_kind::int4:
      return of.m < tiles_from_rows ? kernels.int4_gemm_few(args) : kernels.int4_gemm(args);
    case weight_kind::bf16:
      return kernels.bf16_gemm(args);
  }
}

}  // namespace kt
