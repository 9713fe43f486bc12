// Layers for Python: they check their tensors once, keep them alive and read them in place.
#include "module_layers.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "binding.h"
#include "experts/experts.h"
#include "kernels.h"
#include "linear/linear.h"
#include "module_numa.h"
#include "released_gil.h"
#include "scratch.h"
#include "tensor_view.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace kt {
namespace {

constexpr int64_t max_chunk = int64_t{1} << 20;  // whose rows are counted in 32 bits

// A packed tensor as it is given: one, or a list of one for each part of the weight.
std::vector<nb::object> in_parts(const nb::object& given) {
  if (!nb::isinstance<nb::list>(given) && !nb::isinstance<nb::tuple>(given)) return {given};
  std::vector<nb::object> parts;
  for (nb::handle part : given) parts.push_back(nb::borrow(part));
  return parts;
}

std::vector<nb::object> joined(std::initializer_list<std::vector<nb::object>> arguments) {
  std::vector<nb::object> all;
  for (const auto& parts : arguments) all.insert(all.end(), parts.begin(), parts.end());
  return all;
}

// Where the parts of a layer's weights lie; no nodes: in one part, anywhere.
struct placing {
  numa_mode mode;
  std::vector<int> nodes;

  placing(const std::string& mode_name, std::vector<int> on)
      : mode(find_numa_mode(mode_name)), nodes(std::move(on)) {
    if (!nodes.empty()) check_nodes(nodes);
    if (static_cast<int>(nodes.size()) > max_task_groups) {
      value_error("nodes: " + std::to_string(nodes.size()) + ", expected at most " +
                  std::to_string(max_task_groups));
    }
  }

  std::vector<numa_part> plan(int64_t n) const {
    return plan_numa(mode, nodes.empty() ? std::vector{0} : nodes, {1, padded_n(n), 1});
  }
};

// Views a weight of matrices with n outputs. view_packed(tensor, name, outputs) and view_scale do
// so with the tensors of a part that has some of the outputs.
template <typename packed_view, typename scale_view>
placed_weight view_weight(const placing& where, int64_t n, const std::vector<nb::object>& packed,
                          const char* packed_name, const packed_view& view_packed,
                          const std::vector<nb::object>& scale, const char* scale_name,
                          const scale_view& view_scale) {
  const std::vector<numa_part> plan = where.plan(n);
  const auto check_count = [&](const std::vector<nb::object>& parts, const char* name) {
    if (parts.size() == plan.size()) return;
    value_error(std::string(name) + ": in " + std::to_string(parts.size()) + " parts, expected " +
                std::to_string(plan.size()));
  };
  check_count(packed, packed_name);
  check_count(scale, scale_name);
  placed_weight weight{{}, where.mode == numa_mode::replicate};
  for (size_t i = 0; i < plan.size(); ++i) {
    const std::string suffix = plan.size() > 1 ? "[" + std::to_string(i) + "]" : "";
    const tensor_view p = view_packed(packed[i], packed_name + suffix, plan[i].outputs);
    const tensor_view s = view_scale(scale[i], scale_name + suffix, plan[i].outputs);
    weight.parts.push_back({plan[i].nodes.front(),
                            plan[i].first_output,
                            plan[i].outputs,
                            {data<const char>(p), data<const char>(s)}});
  }
  return weight;
}

int64_t checked_chunk(std::optional<int64_t> chunk_tokens) {
  if (!chunk_tokens) return default_chunk_tokens;
  check_size("chunk_tokens", *chunk_tokens, max_chunk);
  return *chunk_tokens;
}

// What every layer has: tensors that it keeps alive, and how it computes.
class packed_layer {
 public:
  packed_layer(std::vector<nb::object> tensors, weight_format format, std::optional<int> threads,
               std::optional<int64_t> chunk_tokens, const optional_isa& wanted)
      : tensors_(std::move(tensors)),
        format_(format),
        threads_(checked_threads(threads)),
        chunk_tokens_(checked_chunk(chunk_tokens)) {
    const kt::isa cap = chosen_isa(wanted);
    isa_ = selected_isa(product_of(format), cap);
    kernels_ = select_kernels(cap);
  }

  int threads() const { return threads_; }
  int64_t chunk_tokens() const { return chunk_tokens_; }
  std::string format() const { return format_name(format_); }
  std::string isa() const { return isa_name(isa_); }

  int traverse(visitproc visit, void* arg) {
    for (nb::object& tensor : tensors_) Py_VISIT(tensor.ptr());
    return 0;
  }

  // Only for a layer that the garbage collector has found unreachable: it cannot be called again.
  void clear() {
    for (nb::object& tensor : tensors_) tensor.reset();
  }

 protected:
  // Calls compute(begin, count) without the GIL for `rows` rows, at most `step` at a time: in
  // between Ctrl-C is heard, so that it is prompt even in the longest prompt.
  template <typename function>
  void in_chunks(int64_t rows, int64_t step, const function& compute) const {
    for (int64_t begin = 0; begin < rows; begin += step) {
      {
        const released_gil release;
        compute(begin, std::min(rows - begin, step));
      }
      if (PyErr_CheckSignals() != 0) throw nb::python_error();
    }
  }

  const kernel_table& kernels() const { return kernels_; }

 private:
  std::vector<nb::object> tensors_;
  weight_format format_;
  int threads_;
  int64_t chunk_tokens_;
  kt::isa isa_;
  kernel_table kernels_;
};

class experts : public packed_layer {
 public:
  experts(const nb::object& gate_up, const nb::object& gate_up_scale, const nb::object& down,
          const nb::object& down_scale, const std::string& format_name, int64_t hidden_size,
          int64_t moe_intermediate_size, std::optional<int> threads,
          std::optional<int64_t> chunk_tokens, const std::string& numa,
          const std::vector<int>& nodes, const optional_isa& wanted)
      : packed_layer(joined({in_parts(gate_up), in_parts(gate_up_scale), in_parts(down),
                             in_parts(down_scale)}),
                     find_format(format_name), threads, chunk_tokens, wanted) {
    const weight_format format = find_format(format_name);
    check_size("hidden_size", hidden_size, gemm_max_k);
    check_size("moe_intermediate_size", moe_intermediate_size, gemm_max_k);
    const int64_t d = hidden_size, f = moe_intermediate_size;
    const placing where(numa, nodes);
    const element type = scale_element(format);
    int64_t count = any_size;  // of experts: the first tensor says
    placed_weight gates_and_ups = view_weight(
        where, f, in_parts(gate_up), "gate_up_packed",
        [&](nb::handle tensor, const std::string& name, int64_t outputs) {
          const tensor_view view = view_tensor(tensor, name.c_str(), {element::uint8},
                                               {count, 2 * packed_bytes(format, outputs, d)});
          count = view.shape[0];
          check_size("num_experts", count, int64_t{1} << 20);
          return view;
        },
        in_parts(gate_up_scale), "gate_up_scale",
        [&](nb::handle tensor, const std::string& name, int64_t outputs) {
          return view_tensor(tensor, name.c_str(), {type},
                             {count, 2, scale_count(format, outputs, d)});
        });
    placed_weight downs = view_weight(
        where, d, in_parts(down), "down_packed",
        [&](nb::handle tensor, const std::string& name, int64_t outputs) {
          return view_tensor(tensor, name.c_str(), {element::uint8},
                             {count, packed_bytes(format, outputs, f)});
        },
        in_parts(down_scale), "down_scale",
        [&](nb::handle tensor, const std::string& name, int64_t outputs) {
          return view_tensor(tensor, name.c_str(), {type},
                             {count, scale_count(format, outputs, f)});
        });
    weights_ = {format, count, d, f, std::move(gates_and_ups), std::move(downs)};
  }

  experts_input view(nb::handle hidden_states, nb::handle top_k_index, nb::handle top_k_weights,
                     nb::handle out) const {
    const tensor_view x =
        view_tensor(hidden_states, "hidden_states", {element::bf16, element::fp32},
                    {any_size, weights_.hidden_size}, access::read);
    const int64_t tokens = x.shape[0];
    const tensor_view index =
        view_tensor(top_k_index, "top_k_index", {element::int64, element::int32},
                    {tokens, any_size}, access::read);
    const int64_t top_k = index.shape[1];
    const tensor_view weight =
        view_tensor(top_k_weights, "top_k_weights", {element::fp32, element::bf16, element::fp16},
                    {tokens, top_k}, access::read);
    const tensor_view y = view_tensor(out, "out", {x.type}, {tokens, weights_.hidden_size});
    return {{tokens, top_k, index.data,
             index.type == element::int64 ? index_type::int64 : index_type::int32, weight.data,
             as_float_type(weight.type)},
            x.data,
            y.data,
            as_float_type(x.type)};
  }

  void check(const routing_input& routed) const {
    const int64_t bad = first_bad_index(routed, weights_.num_experts);
    if (bad < 0) return;
    value_error("top_k_index: token " + std::to_string(bad / routed.top_k) + ", slot " +
                std::to_string(bad % routed.top_k) + " names expert " +
                std::to_string(expert_at(routed, bad)) + ", expected 0 to " +
                std::to_string(weights_.num_experts - 1) + ", or " +
                std::to_string(weights_.num_experts) + " to skip the slot");
  }

  int64_t step(const routing_input& routed) const {
    return max_chunk_tokens(routed.top_k, chunk_tokens());
  }

  void compute(const experts_input& input, int64_t begin, int64_t count) const {
    experts_forward(kernels(), weights_, input, begin, count, threads());
  }

  void forward(nb::handle hidden_states, nb::handle top_k_index, nb::handle top_k_weights,
               nb::handle out) const {
    const experts_input input = view(hidden_states, top_k_index, top_k_weights, out);
    check(input.routed);
    in_chunks(input.routed.tokens, step(input.routed),
              [&](int64_t begin, int64_t count) { compute(input, begin, count); });
  }

  const experts_weights& weights() const { return weights_; }
  int64_t num_experts() const { return weights_.num_experts; }
  int64_t hidden_size() const { return weights_.hidden_size; }
  int64_t moe_intermediate_size() const { return weights_.moe_intermediate_size; }

 private:
  experts_weights weights_;
};

class linear : public packed_layer {
 public:
  linear(const nb::object& packed, const nb::object& scale, const std::string& format_name,
         int64_t in_features, int64_t out_features, std::optional<int> threads,
         std::optional<int64_t> chunk_tokens, const std::string& numa,
         const std::vector<int>& nodes, const optional_isa& wanted)
      : packed_layer(joined({in_parts(packed), in_parts(scale)}), find_format(format_name), threads,
                     chunk_tokens, wanted) {
    const weight_format format = find_format(format_name);
    check_size("in_features", in_features, gemm_max_k);
    check_size("out_features", out_features, int64_t{1} << 30);
    const int64_t k = in_features;
    placed_weight matrix = view_weight(
        placing(numa, nodes), out_features, in_parts(packed), "packed",
        [&](nb::handle tensor, const std::string& name, int64_t outputs) {
          return view_tensor(tensor, name.c_str(), {element::uint8},
                             {packed_bytes(format, outputs, k)});
        },
        in_parts(scale), "scale",
        [&](nb::handle tensor, const std::string& name, int64_t outputs) {
          return view_tensor(tensor, name.c_str(), {scale_element(format)},
                             {scale_count(format, outputs, k)});
        });
    weights_ = {format, k, out_features, std::move(matrix)};
  }

  void forward(nb::handle x, nb::handle out) const {
    const tensor_view xv =
        view_tensor(x, "x", {element::bf16, element::fp32}, {any_size, weights_.in_features});
    const int64_t rows = xv.shape[0];
    const tensor_view y = view_tensor(out, "out", {xv.type}, {rows, weights_.out_features});
    compute({xv.data, y.data, as_float_type(xv.type)}, rows);
  }

  void compute(const linear_input& input, int64_t rows) const {
    in_chunks(rows, chunk_tokens(), [&](int64_t begin, int64_t count) {
      linear_forward(kernels(), weights_, input, begin, count, threads());
    });
  }

  const linear_weights& weights() const { return weights_; }
  int64_t in_features() const { return weights_.in_features; }
  int64_t out_features() const { return weights_.out_features; }

 private:
  linear_weights weights_;
};

template <typename layer>
const layer& layer_in(nb::handle object, const char* name, const char* expected) {
  const layer* found = nullptr;
  if (nb::try_cast(object, found) && found) return *found;
  throw nb::type_error((std::string(name) + ": expected " + expected).c_str());
}

template <typename layer>
int traverse_layer(PyObject* self, visitproc visit, void* arg) {
#if PY_VERSION_HEX >= 0x03090000
  Py_VISIT(Py_TYPE(self));
#endif
  if (!nb::inst_ready(self)) return 0;
  return nb::inst_ptr<layer>(self)->traverse(visit, arg);
}

template <typename layer>
int clear_layer(PyObject* self) {
  if (nb::inst_ready(self)) nb::inst_ptr<layer>(self)->clear();
  return 0;
}

template <typename layer>
PyType_Slot layer_slots[] = {{Py_tp_traverse, reinterpret_cast<void*>(traverse_layer<layer>)},
                             {Py_tp_clear, reinterpret_cast<void*>(clear_layer<layer>)},
                             {0, nullptr}};

const experts* layer_of(const experts_call& call) {
  return static_cast<const experts*>(call.layer);
}

}  // namespace

const linear_weights& linear_weights_of(nb::handle object, const char* name) {
  return layer_in<linear>(object, name, "a Linear").weights();
}

const experts_weights& experts_weights_of(nb::handle object, const char* name) {
  return layer_in<experts>(object, name, "Experts").weights();
}

void linear_rows(nb::handle layer, const linear_input& input, int64_t rows) {
  layer_in<linear>(layer, "layer", "a Linear").compute(input, rows);
}

bool is_experts(nb::handle object) { return nb::isinstance<experts>(object); }

experts_call view_experts_call(nb::handle layer, nb::handle hidden_states, nb::handle top_k_index,
                               nb::handle top_k_weights, nb::handle out) {
  const experts* of = nb::cast<const experts*>(layer);
  const experts_input input = of->view(hidden_states, top_k_index, top_k_weights, out);
  return {of, input, of->step(input.routed)};
}

void check_indices(const experts_call& call) { layer_of(call)->check(call.input.routed); }

void compute(const experts_call& call, int64_t begin, int64_t count) {
  layer_of(call)->compute(call.input, begin, count);
}

void bind_layers(nb::module_& m) {
  m.def("scratch_bytes", &scratch_bytes);
  nb::class_<experts>(m, "Experts", nb::type_slots(layer_slots<experts>))
      .def(
          nb::init<const nb::object&, const nb::object&, const nb::object&, const nb::object&,
                   const std::string&, int64_t, int64_t, std::optional<int>, std::optional<int64_t>,
                   const std::string&, const std::vector<int>&, const optional_isa&>(),
          "gate_up_packed"_a, "gate_up_scale"_a, "down_packed"_a, "down_scale"_a, nb::kw_only(),
          "format"_a, "hidden_size"_a, "moe_intermediate_size"_a, "threads"_a = nb::none(),
          "chunk_tokens"_a = nb::none(), "numa"_a = "interleave", "nodes"_a = std::vector<int>{},
          "isa"_a = nb::none())
      .def("forward", &experts::forward, "hidden_states"_a, "top_k_index"_a, "top_k_weights"_a,
           "out"_a)
      .def_prop_ro("num_experts", &experts::num_experts)
      .def_prop_ro("hidden_size", &experts::hidden_size)
      .def_prop_ro("moe_intermediate_size", &experts::moe_intermediate_size)
      .def_prop_ro("format", &experts::format)
      .def_prop_ro("threads", &experts::threads)
      .def_prop_ro("chunk_tokens", &experts::chunk_tokens)
      .def_prop_ro("isa", &experts::isa);
  nb::class_<linear>(m, "Linear", nb::type_slots(layer_slots<linear>))
      .def(nb::init<const nb::object&, const nb::object&, const std::string&, int64_t, int64_t,
                    std::optional<int>, std::optional<int64_t>, const std::string&,
                    const std::vector<int>&, const optional_isa&>(),
           "packed"_a, "scale"_a, nb::kw_only(), "format"_a, "in_features"_a, "out_features"_a,
           "threads"_a = nb::none(), "chunk_tokens"_a = nb::none(), "numa"_a = "interleave",
           "nodes"_a = std::vector<int>{}, "isa"_a = nb::none())
      .def("forward", &linear::forward, "x"_a, "out"_a)
      .def_prop_ro("in_features", &linear::in_features)
      .def_prop_ro("out_features", &linear::out_features)
      .def_prop_ro("format", &linear::format)
      .def_prop_ro("threads", &linear::threads)
      .def_prop_ro("chunk_tokens", &linear::chunk_tokens)
      .def_prop_ro("isa", &linear::isa);
}

}  // namespace kt
