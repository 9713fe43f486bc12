// The steps of attention in plain C++: the reference that the other files must equal bit for bit.
#include <cassert>
#include <cstring>
#include <limits>

#include "../float_types.h"
#include "../isa.h"
#include "attention.h"
#include "exp2.h"

namespace kt {

void softmax_step_portable(const softmax_step_args& args) {
  record_run(operation::softmax_step, isa::portable);
  assert(args.keys % 2 == 0 && args.columns % 16 == 0);
  for (int64_t j = 0; j < args.columns; ++j) {
    const auto x = [&](int64_t i) {
      return i < args.seen[j] ? args.scores[i * args.columns + j] * args.scale
                              : -std::numeric_limits<float>::infinity();
    };
    float top = args.maximum[j];
    for (int64_t i = 0; i < args.keys; ++i) top = x(i) > top ? x(i) : top;
    float sum = 0.0f;
    for (int64_t i = 0; i < args.keys; ++i) {
      const float weight = attention_exp2(x(i) - top);
      if (args.weights) {
        args.weights[i * args.columns + j] = weight;
        sum = sum + weight;
        continue;
      }
      const uint16_t p = float_to_bf16(weight);
      args.p[(i / 2 * args.columns + j) * 2 + i % 2] = p;
      sum = sum + bf16_to_float(p);
    }
    args.factor[j] = attention_exp2(args.maximum[j] - top);
    args.sum[j] = args.sum[j] * args.factor[j] + sum;
    args.maximum[j] = top;
  }
}

void rescale_add_portable(const rescale_add_args& args) {
  record_run(operation::rescale_add, isa::portable);
  assert(args.n % 16 == 0);
  for (int64_t i = 0; i < args.rows; ++i) {
    const float factor = args.factor[i];
    const float* x = args.x + i * args.x_stride;
    float* acc = args.acc + i * args.acc_stride;
    for (int64_t j = 0; j < args.n; ++j) acc[j] = acc[j] * factor + x[j];
  }
}

void dequantise_rows_portable(const dequantise_rows_args& args) {
  record_run(operation::dequantise_rows, isa::portable);
  assert(args.group_size % 16 == 0);
  const int64_t groups = (args.n + args.group_size - 1) / args.group_size;
  for (int64_t i = 0; i < args.rows; ++i) {
    const int8_t* q = args.q + i * args.n;
    const float* scale = args.scale + i * groups;
    uint16_t* out = args.out + i * args.out_stride;
    for (int64_t j = 0; j < args.n; ++j) {
      out[j] = float_to_bf16(static_cast<float>(q[j]) * scale[j / args.group_size]);
    }
  }
}

void widen_rows_portable(const widen_rows_args& args) {
  record_run(operation::widen_rows, isa::portable);
  for (int64_t i = 0; i < args.rows; ++i) {
    for (int64_t j = 0; j < args.n; ++j) {
      args.out[i * args.out_stride + j] = static_cast<uint16_t>(int16_t{args.q[i * args.n + j]});
    }
  }
}

void pair_rows_portable(const pair_rows_args& args) {
  record_run(operation::pair_rows, isa::portable);
  assert(args.rows % 2 == 0 && args.n % 16 == 0);
  for (int64_t i = 0; i < args.rows; ++i) {
    for (int64_t j = 0; j < args.n; ++j) {
      args.packed[((j / 16 * (args.rows / 2) + i / 2) * 16 + j % 16) * 2 + i % 2] =
          args.x[i * args.x_stride + j];
    }
  }
}

void transpose_pairs_portable(const transpose_pairs_args& args) {
  record_run(operation::transpose_pairs, isa::portable);
  assert(args.rows % 8 == 0 && args.n % 8 == 0);
  for (int64_t i = 0; i < args.rows; ++i) {
    for (int64_t j = 0; j < args.n; ++j) {
      std::memcpy(args.out + (j * args.out_stride + i) * 2, args.x + (i * args.x_stride + j) * 2,
                  2 * sizeof(uint16_t));
    }
  }
}

}  // namespace kt
