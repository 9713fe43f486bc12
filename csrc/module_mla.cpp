// Attention for Python: its layer, which keeps its tensors alive and reads them in place.
#include "module_mla.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "binding.h"
#include "kernels.h"
#include "mla/mla.h"
#include "released_gil.h"
#include "tensor_view.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace kt {
namespace {

// As many tokens as a tile can name.
constexpr int64_t max_tokens = int64_t{1} << 30;

std::optional<mla_form> find_form(const std::optional<std::string>& wanted) {
  if (!wanted) return {};
  if (*wanted == "absorbed") return mla_form::absorbed;
  if (*wanted == "expanded") return mla_form::expanded;
  value_error("form='" + *wanted + "': expected absorbed, expanded or None");
}

// Every sequence's tokens are in pages that exist.
void check_cache(const tensor_view& lengths, const tensor_view& table, int64_t pages,
                 int64_t page_tokens, int64_t tokens, int64_t most) {
  const int64_t max_pages = table.shape[1];
  for (int64_t b = 0; b < lengths.shape[0]; ++b) {
    const int64_t length = data<int32_t>(lengths)[b];
    if (length < tokens || length > most) {
      value_error("lengths[" + std::to_string(b) + "] is " + std::to_string(length) +
                  ", expected " + std::to_string(tokens) + " to " + std::to_string(most) +
                  ": the new tokens, and what block_table and valid have room for");
    }
    for (int64_t i = 0; i * page_tokens < length; ++i) {
      const int64_t page = data<int32_t>(table)[b * max_pages + i];
      if (page >= 0 && page < pages) continue;
      value_error("block_table[" + std::to_string(b) + ", " + std::to_string(i) + "] is " +
                  std::to_string(page) + ", expected 0 to " + std::to_string(pages - 1));
    }
  }
}

class mla_attention {
 public:
  mla_attention(nb::object uk, nb::object uk_scale, nb::object uv, nb::object uv_scale,
                const std::string& format_name, int64_t num_heads, int64_t qk_nope_head_dim,
                int64_t qk_rope_head_dim, int64_t v_head_dim, int64_t kv_lora_rank, double scaling,
                std::optional<int> threads, const optional_isa& wanted)
      : tensors_{uk, uk_scale, uv, uv_scale},
        threads_(checked_threads(threads)),
        scaling_(static_cast<float>(scaling)) {
    const kt::isa cap = chosen_isa(wanted);
    isa_ = selected_isa(operation::bf16_gemm, cap);
    kernels_ = select_kernels(cap);
    check_size("num_heads", num_heads, max_size);
    check_size("qk_nope_head_dim", qk_nope_head_dim, max_size);
    check_size("qk_rope_head_dim", qk_rope_head_dim, max_size);
    check_size("v_head_dim", v_head_dim, max_size);
    check_size("kv_lora_rank", kv_lora_rank, max_size);
    const weight_format format = find_format(format_name);
    const auto half = [&](nb::handle packed, const char* packed_name, nb::handle scale,
                          const char* scale_name, int64_t n, int64_t k) {
      const tensor_view p = view_tensor(packed, packed_name, {element::uint8},
                                        {num_heads, packed_bytes(format, n, k)});
      const tensor_view s = view_tensor(scale, scale_name, {scale_element(format)},
                                        {num_heads, scale_count(format, n, k)});
      return packed_matrix{data<const char>(p), data<const char>(s)};
    };
    const packed_matrix k =
        half(uk, "uk_packed", uk_scale, "uk_scale", kv_lora_rank, qk_nope_head_dim);
    const packed_matrix v = half(uv, "uv_packed", uv_scale, "uv_scale", v_head_dim, kv_lora_rank);
    weights_ = {format, num_heads, kv_lora_rank, qk_rope_head_dim, qk_nope_head_dim, v_head_dim,
                k,      v};
  }

  void forward(nb::handle q, nb::handle latent, nb::handle latent_scale, nb::handle rope,
               nb::handle block_table, nb::handle lengths, nb::handle valid, nb::handle out,
               const std::optional<std::string>& form) const {
    const mla_input input =
        view_input(q, {latent, latent_scale, rope, block_table, lengths, valid}, out);
    const std::optional<mla_form> chosen = find_form(form);
    int64_t sequence = 0, token = 0;
    while (sequence < input.batch && token < input.tokens) {
      const mla_chunk chunk = mla_chunk_at(weights_, input, chosen, sequence, token);
      {
        const released_gil release;
        mla_forward(kernels_, weights_, input, chunk, threads_);
      }
      if (PyErr_CheckSignals() != 0) throw nb::python_error();
      token = chunk.first_token + chunk.tokens;
      if (token < input.tokens) continue;
      token = 0;
      sequence += chunk.sequences;
    }
  }

  const mla_weights& weights() const { return weights_; }
  int64_t num_heads() const { return weights_.heads; }
  int64_t qk_nope_head_dim() const { return weights_.nope; }
  int64_t qk_rope_head_dim() const { return weights_.rope; }
  int64_t v_head_dim() const { return weights_.value; }
  int64_t kv_lora_rank() const { return weights_.latent; }
  int threads() const { return threads_; }
  std::string format() const { return format_name(weights_.format); }
  std::string isa() const { return isa_name(isa_); }
  static int traverse(PyObject* self, visitproc visit, void* arg);
  static int clear(PyObject* self);

 private:
  static constexpr int64_t max_size = gemm_max_k / 4;

  mla_input view_input(nb::handle q, const cache_arguments& cached, nb::handle out) const;

  std::vector<nb::object> tensors_;
  int threads_;
  float scaling_;
  kt::isa isa_;
  kernel_table kernels_;
  mla_weights weights_;
};

mla_input mla_attention::view_input(nb::handle q, const cache_arguments& cached,
                                    nb::handle out) const {
  const tensor_view qv =
      view_tensor(q, "q", {element::bf16, element::fp32},
                  {any_size, any_size, weights_.heads, weights_.nope + weights_.rope});
  const int64_t batch = qv.shape[0], tokens = qv.shape[1];
  const tensor_view o =
      view_tensor(out, "out", {qv.type}, {batch, tokens, weights_.heads * weights_.value});
  return {batch,
          tokens,
          qv.data,
          o.data,
          as_float_type(qv.type),
          scaling_,
          view_cache(weights_, batch, tokens, cached)};
}

int mla_attention::traverse(PyObject* self, visitproc visit, void* arg) {
#if PY_VERSION_HEX >= 0x03090000
  Py_VISIT(Py_TYPE(self));
#endif
  if (!nb::inst_ready(self)) return 0;
  for (nb::object& tensor : nb::inst_ptr<mla_attention>(self)->tensors_) Py_VISIT(tensor.ptr());
  return 0;
}

// Only for a layer that the garbage collector has found unreachable: it cannot be called again.
int mla_attention::clear(PyObject* self) {
  if (!nb::inst_ready(self)) return 0;
  for (nb::object& tensor : nb::inst_ptr<mla_attention>(self)->tensors_) tensor.reset();
  return 0;
}

PyType_Slot attention_slots[] = {{Py_tp_traverse, reinterpret_cast<void*>(mla_attention::traverse)},
                                 {Py_tp_clear, reinterpret_cast<void*>(mla_attention::clear)},
                                 {0, nullptr}};

}  // namespace

const mla_weights& mla_weights_of(nb::handle object) {
  const mla_attention* found = nullptr;
  if (nb::try_cast(object, found) && found) return found->weights();
  throw nb::type_error("attention: expected an MlaAttention");
}

latent_cache view_cache(const mla_weights& weights, int64_t batch, int64_t tokens,
                        const cache_arguments& arguments) {
  const tensor_view c =
      view_tensor(arguments.latent, "latent", {element::bf16, element::fp32, element::int8},
                  {any_size, any_size, weights.latent});
  const int64_t pages = c.shape[0], page_tokens = c.shape[1];
  latent_cache cache{};
  cache.page_tokens = page_tokens;
  cache.latent = c.data;
  cache.type = c.type == element::bf16   ? latent_type::bf16
               : c.type == element::fp32 ? latent_type::fp32
                                         : latent_type::int8;
  if ((c.type == element::int8) == arguments.latent_scale.is_none()) {
    value_error("latent_scale: expected for an int8 latent, and for no other");
  }
  if (c.type == element::int8) {
    cache.scale = data<float>(view_tensor(arguments.latent_scale, "latent_scale", {element::fp32},
                                          {pages, page_tokens, latent_groups(weights.latent)}));
  }
  const tensor_view r = view_tensor(arguments.rope, "rope", {element::bf16, element::fp32},
                                    {pages, page_tokens, weights.rope});
  cache.rope = r.data;
  cache.rope_type = as_float_type(r.type);
  const tensor_view table =
      view_tensor(arguments.block_table, "block_table", {element::int32}, {batch, any_size});
  cache.block_table = data<int32_t>(table);
  cache.max_pages = table.shape[1];
  const tensor_view l = view_tensor(arguments.lengths, "lengths", {element::int32}, {batch});
  cache.lengths = data<int32_t>(l);
  int64_t most = std::min(max_tokens, cache.max_pages * page_tokens);
  if (!arguments.valid.is_none()) {
    const tensor_view v =
        view_tensor(arguments.valid, "valid", {element::uint8}, {batch, any_size});
    cache.valid = data<uint8_t>(v);
    cache.valid_stride = v.shape[1];
    most = std::min(most, v.shape[1]);
  }
  check_cache(l, table, pages, page_tokens, tokens, most);
  return cache;
}

void bind_mla(nb::module_& m) {
  nb::class_<mla_attention>(m, "MlaAttention", nb::type_slots(attention_slots))
      .def(nb::init<nb::object, nb::object, nb::object, nb::object, const std::string&, int64_t,
                    int64_t, int64_t, int64_t, int64_t, double, std::optional<int>,
                    const optional_isa&>(),
           "uk_packed"_a, "uk_scale"_a, "uv_packed"_a, "uv_scale"_a, nb::kw_only(), "format"_a,
           "num_heads"_a, "qk_nope_head_dim"_a, "qk_rope_head_dim"_a, "v_head_dim"_a,
           "kv_lora_rank"_a, "scaling"_a, "threads"_a = nb::none(), "isa"_a = nb::none())
      .def("forward", &mla_attention::forward, "q"_a, "latent"_a, "latent_scale"_a.none(), "rope"_a,
           "block_table"_a, "lengths"_a, "valid"_a.none(), "out"_a, nb::kw_only(),
           "form"_a = nb::none())
      .def_prop_ro("num_heads", &mla_attention::num_heads)
      .def_prop_ro("qk_nope_head_dim", &mla_attention::qk_nope_head_dim)
      .def_prop_ro("qk_rope_head_dim", &mla_attention::qk_rope_head_dim)
      .def_prop_ro("v_head_dim", &mla_attention::v_head_dim)
      .def_prop_ro("kv_lora_rank", &mla_attention::kv_lora_rank)
      .def_prop_ro("format", &mla_attention::format)
      .def_prop_ro("threads", &mla_attention::threads)
      .def_prop_ro("isa", &mla_attention::isa);
}

}  // namespace kt
