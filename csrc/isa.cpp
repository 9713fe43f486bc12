// Names of instruction sets and operations, and the counters of what ran.
#include "isa.h"

#include <atomic>

namespace kt {
namespace {

// Counters come in shards that threads share as little as possible: one line of memory that all
// threads write to several times per task would be a bottleneck with many of them.
constexpr unsigned shards = 64;

struct alignas(64) counters {
  std::atomic<uint64_t> runs[operation_count][isa_count];
};

counters all_counters[shards];

counters& own_counters() {
  static std::atomic<unsigned> threads{0};
  thread_local const unsigned shard = threads.fetch_add(1, std::memory_order_relaxed) % shards;
  return all_counters[shard];
}

constexpr const char* isa_names[isa_count] = {"portable",    "avx2",     "avx_vnni", "avx512_vnni",
                                              "avx512_bf16", "amx_int8", "amx_bf16"};
constexpr const char* operation_names[operation_count] = {
    "quantize_rows", "quantize_pairs",  "sum_groups",  "int8_gemm",       "int4_gemm",
    "bf16_gemm",     "int16_gemm",      "silu_mul",    "weighted_add",    "round_rows",
    "int4_quantize", "softmax_step",    "rescale_add", "dequantise_rows", "widen_rows",
    "pair_rows",     "transpose_pairs", "rms_norm",    "add_rows",        "router_logits",
    "int8_peak",     "int4_peak",       "bf16_peak"};

}  // namespace

const char* isa_name(isa level) { return isa_names[static_cast<int>(level)]; }

const char* operation_name(operation op) { return operation_names[static_cast<int>(op)]; }

void record_run(operation op, isa level) {
  own_counters().runs[static_cast<int>(op)][static_cast<int>(level)].fetch_add(
      1, std::memory_order_relaxed);
}

uint64_t recorded_runs(operation op, isa level) {
  uint64_t sum = 0;
  for (const counters& shard : all_counters) {
    sum +=
        shard.runs[static_cast<int>(op)][static_cast<int>(level)].load(std::memory_order_relaxed);
  }
  return sum;
}

}  // namespace kt
