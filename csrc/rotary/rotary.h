// Rotary position embedding (arXiv 2104.09864) of DeepSeek's attention: pair j of a row is turned
// by an angle of its token,
//
//   (a, b) -> round(a * cos_j - b * sin_j), round(b * cos_j + a * sin_j)
//
// in fp32, nothing fused, and `round` is to the row's type; transformers rounds products too where
// it computes in bf16. Where pairs lie in a row differs: V2 takes neighbours and leaves them there,
// V3 takes neighbours (or, not interleaved, the two halves) and leaves halves.
#pragma once

#include <cstdint>

#include "../quantize/quantize.h"

namespace kt {

enum class rotary_form : uint8_t { neighbours, neighbours_to_halves, halves };

constexpr int64_t max_rotary = 512;  // values of a row

// Cosines and sines of tokens: of a token's pair j, element j * step of each.
struct rotary_angles {
  const void* cos;
  const void* sin;
  float_type type;
  int64_t step;
  int64_t stride;  // elements from one token to the next
};

struct rotary_args {
  rotary_form form;
  int64_t n;  // values of a row, even, at most max_rotary
  int64_t heads;
  const void* x;       // [heads][x_stride]
  int64_t x_stride;    // elements from one head to the next
  void* out;           // [heads][out_stride]; may be x
  int64_t out_stride;  // likewise
  float_type type;     // of both: bf16 or fp32
  rotary_angles angles;
  int64_t token;  // whose angles to take
};

// The rows of one token.
void rotate(const rotary_args& args);

}  // namespace kt
