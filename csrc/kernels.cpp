// Dispatch: turns the list of kernels into tables of function pointers.
#include "kernels.h"

namespace kt {

#define KT_KERNEL(op, level) op##_fn op##_##level;
#include "kernels.inc"
#undef KT_KERNEL

namespace {

kernel_table select_up_to(isa cap) {
  kernel_table table{};
#define KT_KERNEL(op, level) \
  if (isa::level <= cap && isa_supported(isa::level)) table.op = op##_##level;
#include "kernels.inc"
#undef KT_KERNEL
  return table;
}

}  // namespace

kernel_table select_kernels(isa cap) {
  kernel_table table = select_up_to(cap);
  const kernel_table untiled = select_up_to(cap < isa::amx_int8 ? cap : isa::avx512_bf16);
  table.int8_gemm_few = untiled.int8_gemm;
  table.int4_gemm_few = untiled.int4_gemm;
  table.bf16_in_tiles = table.bf16_gemm != untiled.bf16_gemm;
  return table;
}

isa selected_isa(operation op, isa cap) {
  isa selected = isa::portable;
  int count;
  const kernel_entry* entries = kernel_list(&count);
  for (int i = 0; i < count; ++i) {
    const kernel_entry& entry = entries[i];
    if (entry.op == op && entry.level <= cap && isa_supported(entry.level)) selected = entry.level;
  }
  return selected;
}

const kernel_entry* kernel_list(int* count) {
  static constexpr kernel_entry entries[] = {
#define KT_KERNEL(op, level) {operation::op, isa::level},
#include "kernels.inc"
#undef KT_KERNEL
  };
  *count = static_cast<int>(sizeof(entries) / sizeof(entries[0]));
  return entries;
}

}  // namespace kt
