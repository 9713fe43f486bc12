// Decoder layers for Python: they keep the native layers that they are made of alive. And the
// kernels that only they and tests call.
#include "module_decoder.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "binding.h"
#include "decoder/decoder.h"
#include "kernels.h"
#include "module_layers.h"
#include "module_mla.h"
#include "released_gil.h"
#include "tensor_view.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace kt {
namespace {

constexpr int64_t max_chunk = int64_t{1} << 20;  // as that of other layers

rotary_form find_rotary(const std::string& name) {
  if (name == "neighbours") return rotary_form::neighbours;
  if (name == "neighbours_to_halves") return rotary_form::neighbours_to_halves;
  if (name == "halves") return rotary_form::halves;
  value_error("rotary='" + name + "': expected neighbours, neighbours_to_halves or halves");
}

void expect(const char* name, int64_t found, int64_t expected) {
  if (found == expected) return;
  value_error(std::string(name) + ": " + std::to_string(found) + ", expected " +
              std::to_string(expected));
}

// The angles of so many tokens of `sequences` sequences.
rotary_angles angles_of(nb::handle cos, nb::handle sin, int64_t tokens, int64_t rope,
                        int64_t* sequences) {
  if (sin.is_none()) {  // pairs of cosine and sine, as real and imaginary part
    const tensor_view both =
        view_tensor(cos, "cos", {element::complex64}, {any_size, tokens, rope / 2}, access::read);
    *sequences = both.shape[0];
    return {both.data, data<float>(both) + 1, float_type::fp32, 2, rope};
  }
  // Both halves of a row are the same.
  const tensor_view c = view_tensor(cos, "cos", {element::bf16, element::fp32},
                                    {any_size, tokens, rope}, access::read);
  const tensor_view s = view_tensor(sin, "sin", {c.type}, {c.shape[0], tokens, rope}, access::read);
  *sequences = c.shape[0];
  return {c.data, s.data, as_float_type(c.type), 1, rope};
}

void check_rope(int64_t n) {
  if (n % 2 == 0 && n <= max_rotary) return;
  value_error("qk_rope_head_dim=" + std::to_string(n) + ": expected an even number up to " +
              std::to_string(max_rotary));
}

void check_router(const router_rule& rule) {
  check_size("top_k", rule.top_k, rule.experts);
  check_size("groups", rule.groups, rule.experts);
  check_size("top_groups", rule.top_groups, rule.groups);
  if (rule.experts % rule.groups == 0) return;
  value_error(std::to_string(rule.experts) + " experts can't be cut into " +
              std::to_string(rule.groups) + " equal groups");
}

// Views of tensors in the one type that a layer's norms, router and activations have.
class layer_tensors {
 public:
  const void* norm(nb::handle tensor, const char* name, int64_t n) {
    return view(tensor, name, {n}).data;
  }
  const void* matrix(nb::handle tensor, const char* name, int64_t n, int64_t k) {
    return view(tensor, name, {n, k}).data;
  }
  element type() const { return type_; }

 private:
  tensor_view view(nb::handle tensor, const char* name, std::initializer_list<int64_t> shape) {
    if (type_ != element::other) return view_tensor(tensor, name, {type_}, shape);
    const tensor_view first = view_tensor(tensor, name, {element::bf16, element::fp32}, shape);
    type_ = first.type;
    return first;
  }

  element type_ = element::other;
};

class decoder_layer {
 public:
  decoder_layer(nb::object input_norm, nb::object q_a, nb::object query_norm, nb::object q_b,
                nb::object kv_a, nb::object latent_norm, nb::object attention, nb::object o,
                nb::object mlp_norm, nb::object mlp, nb::object experts, nb::object router,
                nb::object router_bias, double scaling, double eps, double latent_eps,
                const std::string& rotary, int64_t top_k, int64_t groups, int64_t top_groups,
                bool normalise, double routed_scaling, std::optional<int> threads,
                std::optional<int64_t> chunk_tokens, const optional_isa& wanted)
      : objects_{input_norm, q_a,      query_norm, q_b,     kv_a,   latent_norm, attention,
                 o,          mlp_norm, mlp,        experts, router, router_bias},
        threads_(checked_threads(threads)),
        chunk_tokens_(chunk_tokens.value_or(default_chunk_tokens)),
        kernels_(select_kernels(chosen_isa(wanted))) {
    check_size("chunk_tokens", chunk_tokens_, max_chunk);
    weights_.attention = &mla_weights_of(attention);
    weights_.q_b = &linear_weights_of(q_b, "q_b");
    weights_.kv_a = &linear_weights_of(kv_a, "kv_a");
    weights_.o = &linear_weights_of(o, "o");
    weights_.mlp = &experts_weights_of(mlp, "mlp");
    if (!q_a.is_none()) weights_.q_a = &linear_weights_of(q_a, "q_a");
    if (!experts.is_none()) weights_.routed = &experts_weights_of(experts, "experts");
    weights_.hidden_size = weights_.kv_a->in_features;
    weights_.scaling = static_cast<float>(scaling);
    weights_.rotary = find_rotary(rotary);
    check_sizes();
    layer_tensors tensors;
    const auto norm = [&](nb::handle tensor, const char* name, int64_t n, double by) {
      return norm_weight{tensors.norm(tensor, name, n), static_cast<float>(by)};
    };
    const int64_t hidden = weights_.hidden_size;
    weights_.input_norm = norm(input_norm, "input_norm", hidden, eps);
    weights_.mlp_norm = norm(mlp_norm, "mlp_norm", hidden, eps);
    weights_.latent_norm = norm(latent_norm, "latent_norm", weights_.attention->latent, latent_eps);
    if (weights_.q_a) {
      weights_.query_norm = norm(query_norm, "query_norm", weights_.q_a->out_features, latent_eps);
    }
    type_ = tensors.type();
    weights_.type = as_float_type(type_);
    if (!weights_.routed) return;
    const int64_t count = weights_.routed->num_experts;
    weights_.router_weight = tensors.matrix(router, "router", count, hidden);
    weights_.router = {router_bias.is_none() ? scoring::softmax : scoring::sigmoid,
                       count,
                       top_k,
                       groups,
                       top_groups,
                       nullptr,
                       normalise,
                       static_cast<float>(routed_scaling)};
    if (!router_bias.is_none()) {
      weights_.router.bias =
          data<float>(view_tensor(router_bias, "router_bias", {element::fp32}, {count}));
    }
    check_router(weights_.router);
  }

  void forward(nb::handle hidden_states, nb::handle cos, nb::handle sin, nb::handle latent,
               nb::handle latent_scale, nb::handle rope, nb::handle block_table, nb::handle lengths,
               nb::handle valid, nb::handle out, nb::handle chosen, bool last_only) const {
    decoder_input input =
        view_input(hidden_states, {latent, latent_scale, rope, block_table, lengths, valid});
    view_angles(cos, sin, &input);
    view_output(out, chosen, last_only, &input);
    compute(input, decoder_part::all);
  }

  void project(nb::handle hidden_states, nb::handle cos, nb::handle sin, nb::handle latent,
               nb::handle rope, nb::handle block_table, nb::handle lengths, nb::handle q) const {
    decoder_input input =
        view_input(hidden_states, {latent, nb::none(), rope, block_table, lengths, nb::none()});
    view_angles(cos, sin, &input);
    view_queries(q, &input);
    compute(input, decoder_part::project);
  }

  void finish(nb::handle hidden_states, nb::handle q, nb::handle latent, nb::handle rope,
              nb::handle block_table, nb::handle lengths, nb::handle valid, nb::handle out,
              nb::handle chosen, bool last_only) const {
    decoder_input input =
        view_input(hidden_states, {latent, nb::none(), rope, block_table, lengths, valid});
    view_queries(q, &input);
    view_output(out, chosen, last_only, &input);
    compute(input, decoder_part::finish);
  }

  decoder_rows rows() const { return {weights_.hidden_size, type_, &kernels_}; }

  void decode(int64_t batch, const void* x, void* out, nb::handle cos, nb::handle sin,
              const cache_arguments& cached) const {
    decoder_input input = input_of(batch, 1, x, cached);
    view_angles(cos, sin, &input);
    input.out = out;
    compute(input, decoder_part::all);
  }

  static int traverse(PyObject* self, visitproc visit, void* arg);
  static int clear(PyObject* self);

 private:
  void check_sizes() const {
    const mla_weights& of = *weights_.attention;
    const int64_t hidden = weights_.hidden_size;
    check_rope(of.rope);
    if (weights_.q_a) expect("in_features of q_a", weights_.q_a->in_features, hidden);
    expect("in_features of q_b", weights_.q_b->in_features,
           weights_.q_a ? weights_.q_a->out_features : hidden);
    expect("out_features of q_b", weights_.q_b->out_features, of.heads * (of.nope + of.rope));
    expect("out_features of kv_a", weights_.kv_a->out_features, of.latent + of.rope);
    expect("in_features of o", weights_.o->in_features, of.heads * of.value);
    expect("out_features of o", weights_.o->out_features, hidden);
    expect("num_experts of mlp", weights_.mlp->num_experts, 1);
    expect("hidden_size of mlp", weights_.mlp->hidden_size, hidden);
    if (weights_.routed) expect("hidden_size of experts", weights_.routed->hidden_size, hidden);
  }

  decoder_input view_input(nb::handle hidden_states, const cache_arguments& cached) const {
    const tensor_view x = view_tensor(hidden_states, "hidden_states", {type_},
                                      {any_size, any_size, weights_.hidden_size}, access::read);
    return input_of(x.shape[0], x.shape[1], x.data, cached);
  }

  decoder_input input_of(int64_t batch, int64_t tokens, const void* x,
                         const cache_arguments& cached) const {
    decoder_input input{};
    input.batch = batch;
    input.tokens = tokens;
    input.x = x;
    input.cache = view_cache(*weights_.attention, batch, tokens, cached);
    return input;
  }

  void view_angles(nb::handle cos, nb::handle sin, decoder_input* input) const {
    int64_t sequences;
    input->angles = angles_of(cos, sin, input->tokens, weights_.attention->rope, &sequences);
    input->shared_angles = sequences == 1;
    if (sequences != 1) expect("sequences of cos", sequences, input->batch);
  }

  void view_queries(nb::handle q, decoder_input* input) const {
    const mla_weights& of = *weights_.attention;
    input->q =
        view_tensor(q, "q", {type_}, {input->batch, input->tokens, of.heads, of.nope + of.rope})
            .data;
  }

  void view_output(nb::handle out, nb::handle chosen, bool last_only, decoder_input* input) const {
    input->out =
        view_tensor(out, "out", {type_}, {input->batch, input->tokens, weights_.hidden_size}).data;
    input->last_only = last_only;
    if (chosen.is_none()) return;
    if (!weights_.routed) value_error("chosen: this layer has no experts to choose from");
    const int64_t rows = input->batch * (last_only ? 1 : input->tokens);
    input->chosen = data<int32_t>(
        view_tensor(chosen, "chosen", {element::int32}, {rows, weights_.router.top_k}));
  }

  // Ctrl-C is heard between chunks.
  void compute(const decoder_input& input, decoder_part part) const {
    int64_t sequence = 0, token = 0;
    while (sequence < input.batch && token < input.tokens) {
      const decoder_chunk chunk = decoder_chunk_at(input, sequence, token, chunk_tokens_);
      {
        const released_gil release;
        decoder_forward(kernels_, weights_, input, chunk, part, threads_);
      }
      if (PyErr_CheckSignals() != 0) throw nb::python_error();
      token = chunk.first_token + chunk.tokens;
      if (token < input.tokens) continue;
      token = 0;
      sequence += chunk.sequences;
    }
  }

  std::vector<nb::object> objects_;
  int threads_;
  int64_t chunk_tokens_;
  kernel_table kernels_;
  element type_;
  decoder_weights weights_{};
};

int decoder_layer::traverse(PyObject* self, visitproc visit, void* arg) {
#if PY_VERSION_HEX >= 0x03090000
  Py_VISIT(Py_TYPE(self));
#endif
  if (!nb::inst_ready(self)) return 0;
  for (nb::object& object : nb::inst_ptr<decoder_layer>(self)->objects_) Py_VISIT(object.ptr());
  return 0;
}

// Only for a layer that the garbage collector has found unreachable: it cannot be called again.
int decoder_layer::clear(PyObject* self) {
  if (!nb::inst_ready(self)) return 0;
  for (nb::object& object : nb::inst_ptr<decoder_layer>(self)->objects_) object.reset();
  return 0;
}

PyType_Slot decoder_slots[] = {{Py_tp_traverse, reinterpret_cast<void*>(decoder_layer::traverse)},
                               {Py_tp_clear, reinterpret_cast<void*>(decoder_layer::clear)},
                               {0, nullptr}};

void bind_rms_norm(nb::handle x, nb::handle weight, double eps, nb::handle out,
                   const optional_isa& wanted) {
  const tensor_view xv = view_tensor(x, "x", {element::bf16, element::fp32}, {any_size, any_size});
  const int64_t rows = xv.shape[0], n = xv.shape[1];
  const tensor_view w = view_tensor(weight, "weight", {xv.type}, {n});
  const tensor_view o = view_tensor(out, "out", {xv.type}, {rows, n});
  select_kernels(chosen_isa(wanted))
      .rms_norm(
          {rows, n, xv.data, n, w.data, static_cast<float>(eps), o.data, as_float_type(xv.type)});
}

void bind_add_rows(nb::handle a, nb::handle b, nb::handle out, const optional_isa& wanted) {
  const tensor_view av = view_tensor(a, "a", {element::bf16, element::fp32}, {any_size});
  const tensor_view bv = view_tensor(b, "b", {av.type}, {av.shape[0]});
  const tensor_view o = view_tensor(out, "out", {av.type}, {av.shape[0]});
  select_kernels(chosen_isa(wanted))
      .add_rows({av.shape[0], av.data, bv.data, o.data, as_float_type(av.type)});
}

void bind_router_logits(nb::handle x, nb::handle weight, nb::handle out,
                        const optional_isa& wanted) {
  const tensor_view xv = view_tensor(x, "x", {element::bf16, element::fp32}, {any_size, any_size});
  const int64_t rows = xv.shape[0], n = xv.shape[1];
  const tensor_view w = view_tensor(weight, "weight", {xv.type}, {any_size, n});
  const int64_t experts = w.shape[0];
  const tensor_view o = view_tensor(out, "out", {element::fp32}, {rows, experts});
  select_kernels(chosen_isa(wanted))
      .router_logits(
          {rows, experts, n, xv.data, w.data, as_float_type(xv.type), data<float>(o), experts});
}

void bind_rotate(nb::handle x, nb::handle cos, nb::handle sin, nb::handle out,
                 const std::string& rotary) {
  const tensor_view xv =
      view_tensor(x, "x", {element::bf16, element::fp32}, {any_size, any_size, any_size});
  const int64_t tokens = xv.shape[0], heads = xv.shape[1], n = xv.shape[2];
  check_rope(n);
  const tensor_view o = view_tensor(out, "out", {xv.type}, {tokens, heads, n});
  int64_t sequences;
  const rotary_angles angles = angles_of(cos, sin, tokens, n, &sequences);
  expect("sequences of cos", sequences, 1);
  const float_type type = as_float_type(xv.type);
  const int64_t size = xv.type == element::fp32 ? 4 : 2;
  for (int64_t t = 0; t < tokens; ++t) {
    const int64_t first = t * heads * n * size;
    rotate({find_rotary(rotary), n, heads, data<char>(xv) + first, n, data<char>(o) + first, n,
            type, angles, t});
  }
}

void bind_choose_experts(nb::handle logits, nb::handle bias, nb::handle index, nb::handle weight,
                         int64_t groups, int64_t top_groups, bool normalise, double scaling) {
  const tensor_view l = view_tensor(logits, "logits", {element::fp32}, {any_size, any_size});
  const int64_t tokens = l.shape[0], count = l.shape[1];
  const tensor_view i = view_tensor(index, "index", {element::int32}, {tokens, any_size});
  const int64_t top_k = i.shape[1];
  const tensor_view w = view_tensor(weight, "weight", {element::fp32}, {tokens, top_k});
  router_rule rule{bias.is_none() ? scoring::softmax : scoring::sigmoid,
                   count,
                   top_k,
                   groups,
                   top_groups,
                   nullptr,
                   normalise,
                   static_cast<float>(scaling)};
  if (!bias.is_none()) {
    rule.bias = data<float>(view_tensor(bias, "bias", {element::fp32}, {count}));
  }
  check_router(rule);
  std::vector<float> memory(static_cast<size_t>(2 * count + groups));
  for (int64_t t = 0; t < tokens; ++t) {
    std::copy_n(data<float>(l) + t * count, count, memory.begin());
    choose_experts(rule, memory.data(), data<int32_t>(i) + t * top_k, data<float>(w) + t * top_k);
  }
}

const decoder_layer& layer_of(nb::handle object, const char* name) {
  const decoder_layer* found = nullptr;
  if (nb::try_cast(object, found) && found) return *found;
  throw nb::type_error((std::string(name) + ": expected a DecoderLayer").c_str());
}

}  // namespace

decoder_rows decoder_rows_of(nb::handle object, const char* name) {
  return layer_of(object, name).rows();
}

void decode_rows(nb::handle layer, int64_t batch, const void* x, void* out, nb::handle cos,
                 nb::handle sin, const cache_arguments& cached) {
  layer_of(layer, "layer").decode(batch, x, out, cos, sin, cached);
}

void bind_decoder(nb::module_& m) {
  m.def("rms_norm", &bind_rms_norm, "x"_a, "weight"_a, "eps"_a, "out"_a, nb::kw_only(),
        "isa"_a = nb::none());
  m.def("add_rows", &bind_add_rows, "a"_a, "b"_a, "out"_a, nb::kw_only(), "isa"_a = nb::none());
  m.def("router_logits", &bind_router_logits, "x"_a, "weight"_a, "out"_a, nb::kw_only(),
        "isa"_a = nb::none());
  m.def("rotate", &bind_rotate, "x"_a, "cos"_a, "sin"_a.none(), "out"_a, "rotary"_a);
  m.def("choose_experts", &bind_choose_experts, "logits"_a, "bias"_a.none(), "index"_a, "weight"_a,
        nb::kw_only(), "groups"_a = 1, "top_groups"_a = 1, "normalise"_a = false,
        "routed_scaling"_a = 1.0);
  nb::class_<decoder_layer>(m, "DecoderLayer", nb::type_slots(decoder_slots))
      .def(nb::init<nb::object, nb::object, nb::object, nb::object, nb::object, nb::object,
                    nb::object, nb::object, nb::object, nb::object, nb::object, nb::object,
                    nb::object, double, double, double, const std::string&, int64_t, int64_t,
                    int64_t, bool, double, std::optional<int>, std::optional<int64_t>,
                    const optional_isa&>(),
           nb::kw_only(), "input_norm"_a, "q_a"_a.none(), "query_norm"_a.none(), "q_b"_a, "kv_a"_a,
           "latent_norm"_a, "attention"_a, "o"_a, "mlp_norm"_a, "mlp"_a, "experts"_a.none(),
           "router"_a.none(), "router_bias"_a.none(), "scaling"_a, "eps"_a, "latent_eps"_a,
           "rotary"_a, "top_k"_a = 1, "groups"_a = 1, "top_groups"_a = 1, "normalise"_a = false,
           "routed_scaling"_a = 1.0, "threads"_a = nb::none(), "chunk_tokens"_a = nb::none(),
           "isa"_a = nb::none())
      .def("forward", &decoder_layer::forward, "hidden_states"_a, "cos"_a, "sin"_a.none(),
           "latent"_a, "latent_scale"_a.none(), "rope"_a, "block_table"_a, "lengths"_a,
           "valid"_a.none(), "out"_a, "chosen"_a.none() = nb::none(), "last_only"_a = false)
      .def("project", &decoder_layer::project, "hidden_states"_a, "cos"_a, "sin"_a.none(),
           "latent"_a, "rope"_a, "block_table"_a, "lengths"_a, "q"_a)
      .def("finish", &decoder_layer::finish, "hidden_states"_a, "q"_a, "latent"_a, "rope"_a,
           "block_table"_a, "lengths"_a, "valid"_a.none(), "out"_a, "chosen"_a.none() = nb::none(),
           "last_only"_a = false);
}

}  // namespace kt
