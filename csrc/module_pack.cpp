// Packs the experts of a layer from plain tensors, for callers without torch. Signatures and
// documentation are in ktransformers/_native.pyi.
#include "module_pack.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "binding.h"
#include "float_types.h"
#include "module_numa.h"
#include "released_gil.h"
#include "tensor_view.h"
#include "weights/pack_stacks.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace kt {
namespace {

// How a packed tensor of all experts is cut, and where its parts lie.
struct placing {
  numa_mode mode;
  const std::vector<int>& nodes;
  const nb::object& bind;  // see bound_memory
};

// A packed tensor, [experts][matrices][outputs][output_bytes], in the parts of a plan. In one part
// experts are packed in place; in several they are packed beside it, some at a time, and then cut.
class tensor_in_parts {
 public:
  // `bytes` of each matrix, whose `n` outputs are padded.
  tensor_in_parts(const placing& where, int64_t experts, int64_t matrices, int64_t n, int64_t bytes,
                  int64_t at_a_time)
      : experts_(experts),
        matrices_(matrices),
        outputs_(padded_n(n)),
        output_bytes_(bytes / padded_n(n)),
        plan_(plan_numa(where.mode, where.nodes, {experts * matrices, outputs_, output_bytes_})) {
    for (const numa_part& part : plan_) memory_.push_back(bound_memory(part, where.bind));
    if (plan_.size() > 1) beside_.resize(static_cast<size_t>(at_a_time * stride()));
  }

  // Bytes of an expert, and of each of its matrices.
  int64_t stride() const { return matrices_ * matrix_bytes(); }
  int64_t matrix_bytes() const { return outputs_ * output_bytes_; }

  // Where experts from `begin` on are packed to.
  char* from(int64_t begin) {
    if (plan_.size() > 1) return beside_.data();
    return static_cast<char*>(memory_[0]->data()) + begin * stride();
  }

  // Brings experts [begin, end) where they belong.
  void cut(int64_t begin, int64_t end) {
    if (plan_.size() == 1) return;
    const char* from = beside_.data();
    for (int64_t m = begin * matrices_; m < end * matrices_; ++m, from += matrix_bytes()) {
      for (size_t i = 0; i < plan_.size(); ++i) {
        const int64_t bytes = plan_[i].outputs * output_bytes_;
        if (bytes == 0) continue;  // fewer panels than nodes, or a format without scales
        std::memcpy(static_cast<char*>(memory_[i]->data()) + m * bytes,
                    from + plan_[i].first_output * output_bytes_, static_cast<size_t>(bytes));
      }
    }
  }

  // The parts as arrays [experts, ..., elements of the part]; one is no list. Owns nothing after.
  nb::object release(nb::dlpack::dtype type, bool by_matrix) {
    nb::list parts;
    for (size_t i = 0; i < plan_.size(); ++i) {
      const int64_t elements = plan_[i].outputs * output_bytes_ / (type.bits / 8);
      std::vector<size_t> shape{static_cast<size_t>(experts_)};
      if (by_matrix) shape.push_back(static_cast<size_t>(matrices_));
      shape.push_back(static_cast<size_t>(by_matrix ? elements : matrices_ * elements));
      void* const data = memory_[i]->data();
      const nb::capsule owner(memory_[i].release(), [](void* buffer) noexcept {
        delete static_cast<numa_buffer*>(buffer);
      });
      parts.append(nb::ndarray<nb::array_api, nb::c_contig>(data, shape.size(), shape.data(), owner,
                                                            nullptr, type));
    }
    if (parts.size() == 1) return nb::object(parts[0]);
    return parts;
  }

 private:
  const int64_t experts_, matrices_, outputs_, output_bytes_;
  const std::vector<numa_part> plan_;
  std::vector<std::unique_ptr<numa_buffer>> memory_;
  std::vector<char> beside_;
};

void check_finite(const std::vector<non_finite>& found, int64_t begin, int64_t count) {
  constexpr const char* names[] = {"gate_proj", "up_proj", "down_proj"};
  for (int64_t i = 0; i < 3 * count; ++i) {
    const non_finite& one = found[static_cast<size_t>(i)];
    if (one.count == 0) continue;
    value_error(std::string(names[i % 3]) + " of expert " + std::to_string(begin + i / 3) +
                " holds " + std::to_string(one.count) +
                " values that are not finite, the first at [" + std::to_string(one.row) + ", " +
                std::to_string(one.column) + "]");
  }
}

// What the class Experts takes, by name.
nb::dict pack_experts(nb::handle gate_proj, nb::handle up_proj, nb::handle down_proj,
                      const std::string& name, std::optional<int> wanted_threads,
                      const std::string& numa, const std::vector<int>& nodes,
                      const nb::object& bind) {
  const weight_format format = find_format(name);
  const int threads = checked_threads(wanted_threads);
  const placing where{find_numa_mode(numa), nodes, bind};
  check_nodes(nodes);
  const auto view = [](nb::handle tensor, const char* tensor_name, int64_t e, int64_t n,
                       int64_t k) {
    return view_tensor(tensor, tensor_name, {element::bf16, element::fp16, element::fp32},
                       {e, n, k}, access::read);
  };
  const tensor_view gate = view(gate_proj, "gate_proj", any_size, any_size, any_size);
  const int64_t count = gate.shape[0], f = gate.shape[1], d = gate.shape[2];
  check_size("num_experts", count, int64_t{1} << 20);
  check_size("hidden_size", d, gemm_max_k);
  check_size("moe_intermediate_size", f, gemm_max_k);
  const tensor_view up = view(up_proj, "up_proj", count, f, d);
  const tensor_view down = view(down_proj, "down_proj", count, d, f);

  const int64_t size = scale_size(format);
  tensor_in_parts gate_up(where, count, 2, f, packed_bytes(format, f, d), threads);
  tensor_in_parts gate_up_scale(where, count, 2, f, scale_count(format, f, d) * size, threads);
  tensor_in_parts downs(where, count, 1, d, packed_bytes(format, d, f), threads);
  tensor_in_parts down_scale(where, count, 1, d, scale_count(format, d, f) * size, threads);
  const kernel_table kernels = select_kernels(chosen_isa({}));
  std::vector<non_finite> found(static_cast<size_t>(3 * threads));
  for (int64_t begin = 0; begin < count; begin += threads) {
    const int64_t end = std::min(begin + threads, count);
    {
      const released_gil release;
      const auto stack = [&](const tensor_view& of, int64_t n, int64_t k, tensor_in_parts& packed,
                             tensor_in_parts& scale, int64_t matrix) {
        const float_type type = as_float_type(of.type);
        const char* weight =
            static_cast<const char*>(of.data) + begin * n * k * float_type_size(type);
        return matrix_stack{weight,
                            type,
                            n,
                            k,
                            packed.from(begin) + matrix * packed.matrix_bytes(),
                            packed.stride(),
                            scale.from(begin) + matrix * scale.matrix_bytes(),
                            scale.stride()};
      };
      const matrix_stack stacks[] = {stack(gate, f, d, gate_up, gate_up_scale, 0),
                                     stack(up, f, d, gate_up, gate_up_scale, 1),
                                     stack(down, d, f, downs, down_scale, 0)};
      pack_stacks(kernels, format, stacks, 3, 0, end - begin, threads, found.data());
      for (tensor_in_parts* each : {&gate_up, &gate_up_scale, &downs, &down_scale}) {
        each->cut(begin, end);
      }
    }
    check_finite(found, begin, end - begin);
    if (PyErr_CheckSignals() != 0) throw nb::python_error();
  }
  const nb::dlpack::dtype bytes = nb::dtype<uint8_t>();
  const nb::dlpack::dtype scale =
      scale_element(format) == element::bf16
          ? nb::dlpack::dtype{static_cast<uint8_t>(nb::dlpack::dtype_code::Bfloat), 16, 1}
          : nb::dtype<float>();
  nb::dict made;
  made["gate_up_packed"] = gate_up.release(bytes, false);
  made["gate_up_scale"] = gate_up_scale.release(scale, true);
  made["down_packed"] = downs.release(bytes, false);
  made["down_scale"] = down_scale.release(scale, false);
  made["format"] = name;
  made["hidden_size"] = d;
  made["moe_intermediate_size"] = f;
  made["numa"] = numa;
  made["nodes"] = nodes;
  return made;
}

}  // namespace

void bind_pack_experts(nb::module_& m) {
  m.def("pack_experts", &pack_experts, "gate_proj"_a.none(), "up_proj"_a.none(),
        "down_proj"_a.none(), "format"_a, nb::kw_only(), "threads"_a = nb::none(),
        "numa"_a = "interleave", "nodes"_a = std::vector<int>{0}, "bind"_a.none() = nb::none());
}

}  // namespace kt
