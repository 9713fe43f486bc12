// The rate at which registers alone can do a kernel's dot product, exact int8, int8 by int4, or
// bf16 with fp32 sums: no loads in the loop. Benchmarks state a kernel's speed as a share of it.
//
// Where one instruction does both integer dot products (vpdpbusd, tdpbssd) they have one peak. With
// AVX2 alone int4 has a higher one: its products fit 16 bits, and eight are added before they
// widen.
#pragma once

#include <cstdint>

namespace kt {

struct peak_result {
  int64_t operations;       // multiplications and additions done
  int32_t guard;            // keeps the work from being optimised away
  const char* instruction;  // the instruction or sequence measured
};

using peak_fn = peak_result(int64_t iterations);
using int8_peak_fn = peak_fn;
using int4_peak_fn = peak_fn;
using bf16_peak_fn = peak_fn;

}  // namespace kt
