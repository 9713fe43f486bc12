// The Python binding: checks, messages and the GIL. With module_*.*, released_gil.* and
// tensor_view.* the only code that knows Python. Signatures and their documentation are in
// ktransformers/_native.pyi.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "bench/peak_rate.h"
#include "bench/read_bandwidth.h"
#include "binding.h"
#include "kernels.h"
#include "module_attention.h"
#include "module_decoder.h"
#include "module_engine.h"
#include "module_layers.h"
#include "module_mla.h"
#include "module_numa.h"
#include "module_pack.h"
#include "module_token.h"
#include "released_gil.h"
#include "tensor_view.h"
#include "thread_pool.h"
#include "weights/pack.h"
#include "weights/rows.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace kt {
namespace {

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (isa level : usable_isas(chosen_isa({}))) names.emplace_back(isa_name(level));
  return names;
}

std::vector<std::pair<std::string, std::string>> kernels() {
  int count;
  const kernel_entry* entries = kernel_list(&count);
  std::vector<std::pair<std::string, std::string>> list;
  for (int i = 0; i < count; ++i) {
    list.emplace_back(operation_name(entries[i].op), isa_name(entries[i].level));
  }
  return list;
}

nb::dict kernel_runs() {
  int count;
  const kernel_entry* entries = kernel_list(&count);
  nb::dict runs;
  for (int i = 0; i < count; ++i) {
    runs[nb::make_tuple(operation_name(entries[i].op), isa_name(entries[i].level))] =
        recorded_runs(entries[i].op, entries[i].level);
  }
  return runs;
}

void bind_pack(nb::handle weight, nb::handle packed, nb::handle scale, const std::string& name,
               const optional_isa& wanted) {
  const weight_format format = find_format(name);
  const tensor_view w = view_tensor(weight, "weight", {element::bf16, element::fp16, element::fp32},
                                    {any_size, any_size});
  const int64_t n = w.shape[0], k = w.shape[1];
  check_matrix(n, k);
  const tensor_view p =
      view_tensor(packed, "packed", {element::uint8}, {packed_bytes(format, n, k)});
  const tensor_view s =
      view_tensor(scale, "scale", {scale_element(format)}, {scale_count(format, n, k)});
  const kernel_table kernels = select_kernels(chosen_isa(wanted));
  non_finite found;
  {
    const released_gil release;
    found = pack(kernels, format, w.data, as_float_type(w.type), n, k, p.data, s.data);
  }
  if (found.count) {
    value_error("weight holds " + std::to_string(found.count) +
                " values that are not finite, the first at [" + std::to_string(found.row) + ", " +
                std::to_string(found.column) + "]");
  }
}

void bind_unpack(nb::handle packed, nb::handle out, const std::string& name) {
  const weight_format format = find_format(name);
  const element type = format.kind == weight_kind::bf16 ? element::bf16 : element::int8;
  const tensor_view q = view_tensor(out, "out", {type}, {any_size, any_size});
  check_matrix(q.shape[0], q.shape[1]);
  const tensor_view p = view_tensor(packed, "packed", {element::uint8},
                                    {packed_bytes(format, q.shape[0], q.shape[1])});
  const released_gil release;
  unpack(format, p.data, q.shape[0], q.shape[1], q.data);
}

void bind_quantize_rows(nb::handle x, nb::handle q, nb::handle scale, nb::handle sum,
                        const optional_isa& wanted) {
  const tensor_view xv =
      view_tensor(x, "x", {element::bf16, element::fp16, element::fp32}, {any_size, any_size});
  const int64_t m = xv.shape[0], k = xv.shape[1];
  check_size("k", k, gemm_max_k);
  const tensor_view qv = view_tensor(q, "q", {element::int8}, {m, any_size});
  const int64_t kp = qv.shape[1];
  if (kp < k || kp % int8_gemm_k_multiple) {
    value_error("q: expected a multiple of 64 columns, at least " + std::to_string(k));
  }
  const tensor_view scales = view_tensor(scale, "scale", {element::fp32}, {m});
  const tensor_view sums = view_tensor(sum, "sum", {element::int32}, {m});
  const kernel_table kernels = select_kernels(chosen_isa(wanted));
  const released_gil release;
  kernels.quantize_rows({m, k, kp, xv.data, k, as_float_type(xv.type), data<int8_t>(qv),
                         data<float>(scales), data<int32_t>(sums)});
}

void check_rows(const tensor_view& rows, const char* name, int64_t count) {
  for (int64_t i = 0; i < rows.shape[0]; ++i) {
    const int64_t row = data<int32_t>(rows)[i];
    if (row < 0 || row >= count) {
      value_error(std::string(name) + "[" + std::to_string(i) + "] is " + std::to_string(row) +
                  ", expected 0 to " + std::to_string(count - 1));
    }
  }
}

void bind_sum_groups(nb::handle q, nb::handle sum, const optional_isa& wanted) {
  const tensor_view qv = view_tensor(q, "q", {element::int8}, {any_size, any_size});
  const int64_t m = qv.shape[0], k = qv.shape[1];
  const tensor_view s = view_tensor(sum, "sum", {element::int32}, {m, any_size});
  if (s.shape[1] < 1 || k % s.shape[1] || k / s.shape[1] % 32) {
    value_error("sum: expected columns that divide q's into groups of a multiple of 32");
  }
  const kernel_table kernels = select_kernels(chosen_isa(wanted));
  const released_gil release;
  kernels.sum_groups({m, k, k / s.shape[1], data<int8_t>(qv), data<int32_t>(s)});
}

void bind_gemm(nb::handle a, nb::handle a_scale, nb::handle a_sum, nb::handle packed,
               nb::handle w_scale, nb::handle out, const std::string& name, nb::handle rows,
               const optional_isa& wanted) {
  const weight_format format = find_format(name);
  const bool integers = format.kind != weight_kind::bf16;
  const tensor_view av =
      view_tensor(a, "a", {integers ? element::int8 : element::bf16}, {any_size, any_size});
  const tensor_view c = view_tensor(out, "out", {element::fp32}, {any_size, any_size});
  const int64_t m = c.shape[0], n = c.shape[1], k = av.shape[1];
  check_matrix(n, k);
  const int64_t multiple = integers ? gemm_n_multiple : bf16_gemm_n_multiple;
  if (n % multiple) {
    value_error("out: expected a multiple of " + std::to_string(multiple) + " columns");
  }
  if (k != padded_k(format, k)) {
    value_error("a: expected a multiple of " + std::to_string(padded_k(format, 1)) + " columns");
  }
  activation_rows of{static_cast<char*>(av.data), nullptr, nullptr, nullptr};
  if (integers) {
    of.scale = data<float>(view_tensor(a_scale, "a_scale", {element::fp32}, {av.shape[0]}));
    const int64_t sums = format.group_size ? row_groups(format, k) : 1;
    of.row_sum = of.group_sum =
        data<int32_t>(view_tensor(a_sum, "a_sum", {element::int32}, {av.shape[0], sums}));
  }
  const tensor_view p =
      view_tensor(packed, "packed", {element::uint8},
                  {packed_bytes(format, gemm_n_multiple, k) * n / gemm_n_multiple});
  const tensor_view w =
      view_tensor(w_scale, "w_scale", {scale_element(format)}, {scale_count(format, n, k)});
  const int32_t* row_indices = nullptr;
  if (!rows.is_none()) {
    const tensor_view r = view_tensor(rows, "rows", {element::int32}, {m});
    check_rows(r, "rows", av.shape[0]);
    row_indices = data<int32_t>(r);
  } else if (m != av.shape[0]) {
    value_error("out: expected as many rows as a");
  }
  const kernel_table kernels = select_kernels(chosen_isa(wanted));
  const released_gil release;
  multiply(kernels, format, k, of,
           {m,
            n,
            row_indices,
            0,
            {static_cast<const char*>(p.data), static_cast<const char*>(w.data)},
            data<float>(c),
            n});
}

// Vector kernels work on whole vectors of the widest instruction set.
void check_columns(int64_t n) {
  if (n % 16) value_error("expected a multiple of 16 columns, got " + std::to_string(n));
}

void bind_silu_mul(nb::handle gate, nb::handle up, nb::handle out, const optional_isa& wanted) {
  const tensor_view g = view_tensor(gate, "gate", {element::fp32}, {any_size, any_size});
  const int64_t m = g.shape[0], n = g.shape[1];
  check_columns(n);
  const tensor_view u = view_tensor(up, "up", {element::fp32}, {m, n});
  const tensor_view o = view_tensor(out, "out", {element::fp32}, {m, n});
  const kernel_table kernels = select_kernels(chosen_isa(wanted));
  const released_gil release;
  kernels.silu_mul({m, n, data<float>(g), data<float>(u), n, data<float>(o), n});
}

void bind_weighted_add(nb::handle d, nb::handle token, nb::handle weight, nb::handle y,
                       const optional_isa& wanted) {
  const tensor_view dv = view_tensor(d, "d", {element::fp32}, {any_size, any_size});
  const int64_t m = dv.shape[0], n = dv.shape[1];
  check_columns(n);
  const tensor_view tokens = view_tensor(token, "token", {element::int32}, {m});
  const tensor_view weights = view_tensor(weight, "weight", {element::fp32}, {m});
  const tensor_view yv = view_tensor(y, "y", {element::fp32}, {any_size, n});
  check_rows(tokens, "token", yv.shape[0]);
  const kernel_table kernels = select_kernels(chosen_isa(wanted));
  const released_gil release;
  kernels.weighted_add(
      {m, n, data<int32_t>(tokens), data<float>(weights), data<float>(dv), n, data<float>(yv), n});
}

void bind_round_rows(nb::handle y, nb::handle out, const optional_isa& wanted) {
  const tensor_view yv = view_tensor(y, "y", {element::fp32}, {any_size, any_size});
  const int64_t m = yv.shape[0], n = yv.shape[1];
  const tensor_view o = view_tensor(out, "out", {element::bf16, element::fp32}, {m, n});
  const kernel_table kernels = select_kernels(chosen_isa(wanted));
  const released_gil release;
  kernels.round_rows({m, n, data<float>(yv), n, o.data, n, as_float_type(o.type)});
}

double bench_read_bandwidth(nb::handle buffer, std::optional<int> threads, double seconds) {
  const tensor_view b = view_tensor(buffer, "buffer", {element::uint8}, {any_size});
  check_size("size of buffer", b.shape[0] >> 20, int64_t{1} << 40);
  const int count = checked_threads(threads);
  const released_gil release;
  return read_bandwidth(b.data, b.shape[0], count, seconds);
}

std::pair<double, std::string> bench_peak(const std::string& name, std::optional<int> threads,
                                          double seconds, const optional_isa& wanted) {
  const kernel_table kernels = select_kernels(chosen_isa(wanted));
  peak_fn* kernel = kernels.int8_peak;
  if (find_format(name).kind == weight_kind::int4) kernel = kernels.int4_peak;
  if (find_format(name).kind == weight_kind::bf16) kernel = kernels.bf16_peak;
  const int count = checked_threads(threads);
  const released_gil release;
  return {peak_rate(kernel, count, seconds), kernel(0).instruction};
}

}  // namespace
}  // namespace kt

NB_MODULE(_native, m) {
  using namespace kt;
  m.def("isa", [] { return std::string(isa_name(chosen_isa({}))); });
  m.def("isas", &isas);
  m.def("kernels", &kernels);
  m.def("kernel_runs", &kernel_runs);
  m.def("default_threads", &default_threads);
  m.def("pool_threads", &pool_threads);
  bind_numa(m);
  m.def("formats", [] {
    std::vector<std::string> names;
    for (weight_format format : weight_formats()) names.push_back(format_name(format));
    return names;
  });
  m.def(
      "packed_bytes",
      [](int64_t n, int64_t k, const std::string& format) {
        check_matrix(n, k);
        return packed_bytes(find_format(format), n, k);
      },
      "n"_a, "k"_a, "format"_a);
  m.def(
      "scale_count",
      [](int64_t n, int64_t k, const std::string& format) {
        check_matrix(n, k);
        return scale_count(find_format(format), n, k);
      },
      "n"_a, "k"_a, "format"_a);
  m.def("pack", &bind_pack, "weight"_a, "packed"_a, "scale"_a, "format"_a, nb::kw_only(),
        "isa"_a = nb::none());
  m.def("unpack", &bind_unpack, "packed"_a, "out"_a, "format"_a);
  m.def("quantize_rows", &bind_quantize_rows, "x"_a, "q"_a, "scale"_a, "sum"_a, nb::kw_only(),
        "isa"_a = nb::none());
  m.def("sum_groups", &bind_sum_groups, "q"_a, "sum"_a, nb::kw_only(), "isa"_a = nb::none());
  m.def("gemm", &bind_gemm, "a"_a, "a_scale"_a.none(), "a_sum"_a.none(), "packed"_a, "w_scale"_a,
        "out"_a, "format"_a, nb::kw_only(), "rows"_a.none() = nb::none(), "isa"_a = nb::none());
  m.def("silu_mul", &bind_silu_mul, "gate"_a, "up"_a, "out"_a, nb::kw_only(), "isa"_a = nb::none());
  m.def("weighted_add", &bind_weighted_add, "d"_a, "token"_a, "weight"_a, "y"_a, nb::kw_only(),
        "isa"_a = nb::none());
  m.def("round_rows", &bind_round_rows, "y"_a, "out"_a, nb::kw_only(), "isa"_a = nb::none());
  m.def("bench_read_bandwidth", &bench_read_bandwidth, "buffer"_a, "threads"_a = nb::none(),
        "seconds"_a = 0.2);
  m.def("bench_peak", &bench_peak, "format"_a, "threads"_a = nb::none(), "seconds"_a = 0.2,
        nb::kw_only(), "isa"_a = nb::none());
  bind_layers(m);
  bind_attention_steps(m);
  bind_mla(m);
  bind_decoder(m);
  bind_token(m);
  bind_pack_experts(m);
  bind_engine(m);
  park_threads_at_exit();  // after bind_engine: exit handlers run in reverse
}
