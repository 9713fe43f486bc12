// The instruction sets that kernels are written for, and a record of what ran.
// Files compiled for one instruction set include this header, their operation's own, and headers
// whose functions are all in an anonymous namespace (row_groups.h): the linker can never merge an
// AVX-512 copy of a function into the portable path.
#pragma once

#include <cstdint>

namespace kt {

// In ascending order of preference: for each operation the last is chosen that the processor has
// and that the operation has a kernel for. None implies all those before it: a processor may have
// AVX-VNNI and no AVX-512.
enum class isa : uint8_t { portable, avx2, avx_vnni, avx512_vnni, avx512_bf16, amx_int8, amx_bf16 };
constexpr int isa_count = 7;

enum class operation : uint8_t {
  quantize_rows,
  quantize_pairs,
  sum_groups,
  int8_gemm,
  int4_gemm,
  bf16_gemm,
  int16_gemm,
  silu_mul,
  weighted_add,
  round_rows,
  int4_quantize,
  softmax_step,
  rescale_add,
  dequantise_rows,
  widen_rows,
  pair_rows,
  transpose_pairs,
  rms_norm,
  add_rows,
  router_logits,
  int8_peak,
  int4_peak,
  bf16_peak
};
constexpr int operation_count = 23;

// True where the processor has every instruction of the set and the operating system saves its
// registers. Lives in a file of its own so that a test build can replace it.
bool isa_supported(isa level);

const char* isa_name(isa level);
const char* operation_name(operation op);

// Called by every kernel when it runs, so that a test can tell what ran from what was planned.
void record_run(operation op, isa level);
uint64_t recorded_runs(operation op, isa level);

}  // namespace kt
