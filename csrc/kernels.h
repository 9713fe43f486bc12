// The kernels of one instruction set, chosen at run time from the list in kernels.inc.
#pragma once

#include "attention/attention.h"
#include "bench/peak.h"
#include "bf16_gemm/bf16_gemm.h"
#include "combine/combine.h"
#include "int16_gemm/int16_gemm.h"
#include "int4_gemm/int4_gemm.h"
#include "int4_quantize/int4_quantize.h"
#include "int8_gemm/int8_gemm.h"
#include "isa.h"
#include "norm/norm.h"
#include "quantize/quantize.h"
#include "router/router.h"
#include "silu/silu.h"

namespace kt {

struct kernel_table {
  quantize_rows_fn* quantize_rows;
  quantize_pairs_fn* quantize_pairs;
  sum_groups_fn* sum_groups;
  gemm_fn* int8_gemm;
  gemm_fn* int4_gemm;
  gemm_fn* bf16_gemm;
  int16_gemm_fn* int16_gemm;
  // The same bits as the two without `few`, and faster for a few rows: they have no tiles to fill.
  gemm_fn* int8_gemm_few;
  gemm_fn* int4_gemm_few;
  bool bf16_in_tiles;  // bf16_gemm has instructions for tiles: nothing here is faster
  silu_mul_fn* silu_mul;
  weighted_add_fn* weighted_add;
  round_rows_fn* round_rows;
  int4_quantize_fn* int4_quantize;
  softmax_step_fn* softmax_step;
  rescale_add_fn* rescale_add;
  dequantise_rows_fn* dequantise_rows;
  widen_rows_fn* widen_rows;
  pair_rows_fn* pair_rows;
  transpose_pairs_fn* transpose_pairs;
  rms_norm_fn* rms_norm;
  add_rows_fn* add_rows;
  router_logits_fn* router_logits;
  peak_fn* int8_peak;
  peak_fn* int4_peak;
  peak_fn* bf16_peak;
};

// The instruction set of the kernel that `select_kernels(cap)` has for an operation.
isa selected_isa(operation op, isa cap);

// For each operation the best kernel that this process can run and that is no higher than `cap`.
kernel_table select_kernels(isa cap);

struct kernel_entry {
  operation op;
  isa level;
};

// The list itself; `count` receives its length.
const kernel_entry* kernel_list(int* count);

}  // namespace kt
