// The steps of attention for Python: kernels that only tests call by themselves.
#include "module_attention.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <string>

#include "binding.h"
#include "kernels.h"
#include "tensor_view.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace kt {
namespace {

void check_multiple(const char* name, int64_t value, int64_t multiple) {
  if (value % multiple == 0) return;
  value_error(std::string(name) + ": expected a multiple of " + std::to_string(multiple) +
              ", got " + std::to_string(value));
}

void bind_softmax_step(nb::handle scores, double scale, nb::handle seen, nb::handle maximum,
                       nb::handle sum, nb::handle factor, nb::handle p,
                       const optional_isa& wanted) {
  const tensor_view s = view_tensor(scores, "scores", {element::fp32}, {any_size, any_size});
  const int64_t keys = s.shape[0], columns = s.shape[1];
  check_multiple("rows of scores", keys, 2);
  check_multiple("columns of scores", columns, 16);
  const tensor_view visible = view_tensor(seen, "seen", {element::int32}, {columns});
  const tensor_view m = view_tensor(maximum, "maximum", {element::fp32}, {columns});
  const tensor_view total = view_tensor(sum, "sum", {element::fp32}, {columns});
  const tensor_view f = view_tensor(factor, "factor", {element::fp32}, {columns});
  uint16_t* rounded = nullptr;
  if (!p.is_none()) {
    rounded = data<uint16_t>(view_tensor(p, "p", {element::bf16}, {keys / 2, columns, 2}));
  }
  select_kernels(chosen_isa(wanted))
      .softmax_step({keys, columns, data<float>(s), static_cast<float>(scale),
                     data<int32_t>(visible), data<float>(m), data<float>(total), data<float>(f),
                     rounded, rounded ? nullptr : data<float>(s)});
}

void bind_rescale_add(nb::handle factor, nb::handle x, nb::handle acc, const optional_isa& wanted) {
  const tensor_view xv = view_tensor(x, "x", {element::fp32}, {any_size, any_size});
  const int64_t rows = xv.shape[0], n = xv.shape[1];
  check_multiple("columns of x", n, 16);
  const tensor_view f = view_tensor(factor, "factor", {element::fp32}, {rows});
  const tensor_view a = view_tensor(acc, "acc", {element::fp32}, {rows, n});
  select_kernels(chosen_isa(wanted))
      .rescale_add({rows, n, data<float>(f), data<float>(xv), n, data<float>(a), n});
}

void bind_dequantise_rows(nb::handle q, nb::handle scale, int64_t group_size, nb::handle out,
                          const optional_isa& wanted) {
  check_size("group_size", group_size, gemm_max_k);
  check_multiple("group_size", group_size, 16);
  const tensor_view qv = view_tensor(q, "q", {element::int8}, {any_size, any_size});
  const int64_t rows = qv.shape[0], n = qv.shape[1];
  const tensor_view s =
      view_tensor(scale, "scale", {element::fp32}, {rows, round_up(n, group_size) / group_size});
  const tensor_view o = view_tensor(out, "out", {element::bf16}, {rows, n});
  select_kernels(chosen_isa(wanted))
      .dequantise_rows(
          {rows, n, group_size, data<int8_t>(qv), data<float>(s), data<uint16_t>(o), n});
}

void bind_pair_rows(nb::handle x, nb::handle packed, const optional_isa& wanted) {
  const tensor_view xv = view_tensor(x, "x", {element::bf16}, {any_size, any_size});
  const int64_t rows = xv.shape[0], n = xv.shape[1];
  check_multiple("rows of x", rows, 2);
  check_multiple("columns of x", n, 16);
  const tensor_view p = view_tensor(packed, "packed", {element::bf16}, {n / 16, rows / 2, 16, 2});
  select_kernels(chosen_isa(wanted)).pair_rows({rows, n, data<uint16_t>(xv), n, data<uint16_t>(p)});
}

void bind_transpose_pairs(nb::handle x, nb::handle out, const optional_isa& wanted) {
  const tensor_view xv = view_tensor(x, "x", {element::bf16}, {any_size, any_size, 2});
  const int64_t rows = xv.shape[0], n = xv.shape[1];
  check_multiple("rows of x", rows, 8);
  check_multiple("pairs in a row of x", n, 8);
  const tensor_view o = view_tensor(out, "out", {element::bf16}, {n, rows, 2});
  select_kernels(chosen_isa(wanted))
      .transpose_pairs({rows, n, data<uint16_t>(xv), n, data<uint16_t>(o), rows});
}

void bind_widen_rows(nb::handle q, nb::handle out, const optional_isa& wanted) {
  const tensor_view qv = view_tensor(q, "q", {element::int8}, {any_size, any_size});
  const int64_t rows = qv.shape[0], n = qv.shape[1];
  const tensor_view o = view_tensor(out, "out", {element::int16}, {rows, n});
  select_kernels(chosen_isa(wanted)).widen_rows({rows, n, data<int8_t>(qv), data<uint16_t>(o), n});
}

void bind_quantize_pairs(nb::handle x, nb::handle factor, nb::handle q, nb::handle scale,
                         const optional_isa& wanted) {
  const tensor_view qv = view_tensor(q, "q", {element::int16}, {any_size, any_size, 2});
  const int64_t k = 2 * qv.shape[0], columns = qv.shape[1];
  check_multiple("columns of q", columns, 8);
  const tensor_view s = view_tensor(scale, "scale", {element::fp32}, {columns});
  const bool pairs = factor.is_none();
  const tensor_view xv = pairs ? view_tensor(x, "x", {element::bf16}, {k / 2, columns, 2})
                               : view_tensor(x, "x", {element::fp32}, {k, columns});
  const float* factors =
      pairs ? nullptr : data<float>(view_tensor(factor, "factor", {element::fp32}, {k}));
  select_kernels(chosen_isa(wanted))
      .quantize_pairs({k, columns, xv.data, factors, data<uint16_t>(qv), data<float>(s)});
}

void bind_int16_gemm(nb::handle a, nb::handle a_scale, nb::handle packed, nb::handle w_scale,
                     nb::handle c_scale, nb::handle c, const optional_isa& wanted) {
  const tensor_view av = view_tensor(a, "a", {element::int16}, {any_size, any_size});
  const int64_t m = av.shape[0], k = av.shape[1];
  check_size("columns of a", k, int16_gemm_max_k);
  check_multiple("columns of a", k, 2);
  const tensor_view w =
      view_tensor(packed, "packed", {element::int16}, {any_size, k / 2, panel_outputs, 2});
  const int64_t n = w.shape[0] * panel_outputs;
  const tensor_view as = view_tensor(a_scale, "a_scale", {element::fp32}, {m});
  const tensor_view ws = view_tensor(w_scale, "w_scale", {element::fp32}, {n});
  const tensor_view cs = view_tensor(c_scale, "c_scale", {element::fp32}, {m});
  const tensor_view cv = view_tensor(c, "c", {element::fp32}, {m, n});
  select_kernels(chosen_isa(wanted))
      .int16_gemm({m, n, k, data<uint16_t>(av), k, data<float>(as), data<uint16_t>(w),
                   data<float>(ws), data<float>(cs), data<float>(cv), n});
}

}  // namespace

void bind_attention_steps(nb::module_& m) {
  m.def("softmax_step", &bind_softmax_step, "scores"_a, "scale"_a, "seen"_a, "maximum"_a, "sum"_a,
        "factor"_a, "p"_a.none(), nb::kw_only(), "isa"_a = nb::none());
  m.def("rescale_add", &bind_rescale_add, "factor"_a, "x"_a, "acc"_a, nb::kw_only(),
        "isa"_a = nb::none());
  m.def("dequantise_rows", &bind_dequantise_rows, "q"_a, "scale"_a, "group_size"_a, "out"_a,
        nb::kw_only(), "isa"_a = nb::none());
  m.def("pair_rows", &bind_pair_rows, "x"_a, "packed"_a, nb::kw_only(), "isa"_a = nb::none());
  m.def("transpose_pairs", &bind_transpose_pairs, "x"_a, "out"_a, nb::kw_only(),
        "isa"_a = nb::none());
  m.def("widen_rows", &bind_widen_rows, "q"_a, "out"_a, nb::kw_only(), "isa"_a = nb::none());
  m.def("quantize_pairs", &bind_quantize_pairs, "x"_a, "factor"_a.none(), "q"_a, "scale"_a,
        nb::kw_only(), "isa"_a = nb::none());
  m.def("int16_gemm", &bind_int16_gemm, "a"_a, "a_scale"_a, "packed"_a, "w_scale"_a, "c_scale"_a,
        "c"_a, nb::kw_only(), "isa"_a = nb::none());
}

}  // namespace kt
