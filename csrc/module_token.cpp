// A token in one call: embedding, decoder layers, last norm and head, one after the other.
#include "module_token.h"

#include <nanobind/stl/tuple.h>

#include <cstring>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "binding.h"
#include "module_decoder.h"
#include "module_layers.h"
#include "module_mla.h"
#include "tensor_view.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace kt {
namespace {

void copy_embeddings(const tensor_view& token_ids, const tensor_view& embedding, size_t row_bytes,
                     char* rows) {
  const int64_t vocabulary = embedding.shape[0];
  for (int64_t i = 0; i < token_ids.shape[0]; ++i) {
    const int64_t id = data<int64_t>(token_ids)[i];
    if (id < 0 || id >= vocabulary) {
      value_error("token_ids: " + std::to_string(id) + ", expected 0 to " +
                  std::to_string(vocabulary - 1));
    }
    const size_t first = static_cast<size_t>(id) * row_bytes;
    std::memcpy(rows + static_cast<size_t>(i) * row_bytes, data<char>(embedding) + first,
                row_bytes);
  }
}

int64_t outputs_of(nb::handle head, int64_t hidden_size) {
  const linear_weights& weights = linear_weights_of(head, "head");
  if (weights.in_features != hidden_size) {
    value_error("in_features of head: " + std::to_string(weights.in_features) + ", expected " +
                std::to_string(hidden_size));
  }
  return weights.out_features;
}

void bind_decode_token(const nb::list& layers, nb::handle embedding, nb::handle norm, double eps,
                       nb::handle head, nb::handle token_ids, nb::handle cos, nb::handle sin,
                       const nb::list& caches, nb::handle block_table, nb::handle lengths,
                       nb::handle out, nb::handle check) {
  if (layers.size() == 0 || caches.size() != layers.size()) {
    value_error("caches: " + std::to_string(caches.size()) + ", expected one for each of " +
                std::to_string(layers.size()) + " layers, of which there must be one");
  }
  const nb::object first = layers[0];  // here and below kept, whatever `check` does to lists
  const decoder_rows rows = decoder_rows_of(first, "layer 0");
  const int64_t n = rows.hidden_size;
  const tensor_view ids = view_tensor(token_ids, "token_ids", {element::int64}, {any_size, 1});
  const tensor_view weights =
      view_tensor(embedding, "embedding", {rows.type}, {any_size, n}, access::read);
  const tensor_view scale = view_tensor(norm, "norm", {rows.type}, {n}, access::read);
  const int64_t batch = ids.shape[0];
  const int64_t width = head.is_none() ? n : outputs_of(head, n);
  const tensor_view last = view_tensor(out, "out", {rows.type}, {batch, width});

  const size_t row_bytes = static_cast<size_t>(n) * (rows.type == element::fp32 ? 4 : 2);
  std::vector<char> memory(2 * static_cast<size_t>(batch) * row_bytes);
  char *x = memory.data(), *y = x + static_cast<size_t>(batch) * row_bytes;
  copy_embeddings(ids, weights, row_bytes, x);
  for (size_t i = 0; i < layers.size(); ++i) {
    if (!check.is_none()) check();
    const std::string name = "layer " + std::to_string(i);
    const nb::object layer = layers[i];
    const decoder_rows taken = decoder_rows_of(layer, name.c_str());
    std::tuple<nb::object, nb::object, nb::object> cache;
    if (taken.hidden_size != n || taken.type != rows.type || !nb::try_cast(caches[i], cache)) {
      value_error(name + ": expected rows as of layer 0, and latent, scale and rope of its cache");
    }
    const auto& [latent, latent_scale, rope] = cache;
    decode_rows(layer, batch, x, y, cos, sin,
                {latent, latent_scale, rope, block_table, lengths, nb::none()});
    std::swap(x, y);
  }
  const float_type type = as_float_type(rows.type);
  char* normed = head.is_none() ? data<char>(last) : y;
  rows.kernels->rms_norm({batch, n, x, n, scale.data, static_cast<float>(eps), normed, type});
  if (!head.is_none()) linear_rows(head, {normed, last.data, type}, batch);
}

}  // namespace

void bind_token(nb::module_& m) {
  m.def("decode_token", &bind_decode_token, "layers"_a, "embedding"_a, "norm"_a, "eps"_a,
        "head"_a.none(), "token_ids"_a, "cos"_a, "sin"_a.none(), "caches"_a, "block_table"_a,
        "lengths"_a, "out"_a, "check"_a.none() = nb::none());
}

}  // namespace kt
