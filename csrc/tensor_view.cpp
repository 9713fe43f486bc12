// Takes tensors through DLPack.
//
// A type that offers DLPack's C exchange API (torch from 2.10 on) is asked through that: it fills a
// struct, about 0.1 us, where __dlpack__ makes a capsule in about 7 us. Others go through nanobind,
// which calls __dlpack__ or takes a buffer.
#include "tensor_view.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>

namespace nb = nanobind;

namespace kt {
namespace {

// dlpack.h, version 1.3 (github.com/dmlc/dlpack); only what is used here has a type.
struct exchange_api {
  uint32_t major, minor;
  const exchange_api* previous;
  void* managed_tensor_allocator;
  void* managed_tensor_from_py_object_no_sync;
  void* managed_tensor_to_py_object_no_sync;
  int (*dltensor_from_py_object_no_sync)(void* object, nb::dlpack::dltensor* out);
  void* current_work_stream;
};

constexpr int32_t device_cpu = 1;
constexpr int32_t device_cuda_host = 3;  // pinned memory

constexpr const char* element_names[] = {"bfloat16",  "float16",     "float32", "int8",
                                         "uint8",     "int16",       "int32",   "int64",
                                         "complex64", "another type"};

element element_of(nb::dlpack::dtype type) {
  using nb::dlpack::dtype_code;
  struct known {
    dtype_code code;
    uint8_t bits;
    element type;
  };
  constexpr known all[] = {
      {dtype_code::Bfloat, 16, element::bf16},       {dtype_code::Float, 16, element::fp16},
      {dtype_code::Float, 32, element::fp32},        {dtype_code::Int, 8, element::int8},
      {dtype_code::UInt, 8, element::uint8},         {dtype_code::Int, 16, element::int16},
      {dtype_code::Int, 32, element::int32},         {dtype_code::Int, 64, element::int64},
      {dtype_code::Complex, 64, element::complex64},
  };
  for (const known& one : all) {
    if (type == nb::dlpack::dtype{static_cast<uint8_t>(one.code), one.bits, 1}) return one.type;
  }
  return element::other;
}

std::string shape_text(const int64_t* shape, int dims) {
  std::string text = "[";
  for (int i = 0; i < dims; ++i) {
    text += (i ? ", " : "") + (shape[i] == any_size ? "*" : std::to_string(shape[i]));
  }
  return text + "]";
}

// Checks what a DLTensor says and keeps the part that the kernels need.
tensor_view checked(const nb::dlpack::dltensor& tensor, const std::string& name,
                    std::initializer_list<element> types, std::initializer_list<int64_t> shape) {
  if (tensor.device.device_type != device_cpu && tensor.device.device_type != device_cuda_host) {
    throw nb::value_error((name + ": expected a tensor on the CPU").c_str());
  }
  tensor_view view{};
  view.type = element_of(tensor.dtype);
  bool type_matches = false;
  std::string expected_types;
  for (element type : types) {
    type_matches |= type == view.type;
    expected_types +=
        (expected_types.empty() ? "" : " or ") + std::string(element_names[static_cast<int>(type)]);
  }
  if (!type_matches) {
    throw nb::type_error((name + ": expected " + expected_types + ", got " +
                          element_names[static_cast<int>(view.type)])
                             .c_str());
  }
  bool shape_matches = tensor.ndim == static_cast<int32_t>(shape.size());
  for (int32_t i = 0; shape_matches && i < tensor.ndim; ++i) {
    const int64_t expected = shape.begin()[i];
    shape_matches = expected == any_size || expected == tensor.shape[i];
  }
  if (!shape_matches) {
    throw nb::value_error((name + ": expected shape " +
                           shape_text(shape.begin(), static_cast<int>(shape.size())) + ", got " +
                           shape_text(tensor.shape, tensor.ndim))
                              .c_str());
  }
  int64_t expected_stride = 1;
  int64_t size = 1;
  bool contiguous = true;
  for (int32_t i = tensor.ndim - 1; i >= 0; --i) {
    const int64_t length = tensor.shape[i];
    contiguous &= !tensor.strides || length == 1 || tensor.strides[i] == expected_stride;
    expected_stride *= length;
    size *= length;
    view.shape[i] = length;
  }
  if (!contiguous && size != 0) {
    throw nb::value_error((name + ": expected a contiguous tensor").c_str());
  }
  view.data = static_cast<char*>(tensor.data) + tensor.byte_offset;
  view.dims = tensor.ndim;
  return view;
}

// nullptr where the type does not offer it.
const exchange_api* exchange_api_of(PyTypeObject* type) {
  static PyObject* const attribute = PyUnicode_InternFromString("__dlpack_c_exchange_api__");
  PyObject* capsule = PyObject_GetAttr(reinterpret_cast<PyObject*>(type), attribute);
  const void* api = nullptr;
  if (capsule && PyCapsule_IsValid(capsule, "dlpack_exchange_api")) {
    api = PyCapsule_GetPointer(capsule, "dlpack_exchange_api");
  }
  Py_XDECREF(capsule);
  PyErr_Clear();
  const exchange_api* found = static_cast<const exchange_api*>(api);
  return found && found->major == 1 && found->dltensor_from_py_object_no_sync ? found : nullptr;
}

}  // namespace

tensor_view view_tensor(nb::handle object, const char* name, std::initializer_list<element> types,
                        std::initializer_list<int64_t> shape, access wanted) {
  if (const exchange_api* api = exchange_api_of(Py_TYPE(object.ptr()))) {
    nb::dlpack::dltensor tensor{};
    if (api->dltensor_from_py_object_no_sync(object.ptr(), &tensor) != 0) nb::raise_python_error();
    return checked(tensor, name, types, shape);
  }
  nb::ndarray<nb::ro> array;
  if (!nb::try_cast(object, array)) {
    throw nb::type_error((std::string(name) + ": expected a tensor, got " +
                          nb::cast<std::string>(object.type().attr("__name__")))
                             .c_str());
  }
  nb::ndarray<> writable;
  if (wanted == access::write && !nb::try_cast(object, writable)) {
    throw nb::value_error(
        (std::string(name) + ": expected a tensor that is not read-only").c_str());
  }
  nb::dlpack::dltensor tensor{};
  int64_t sizes[4], strides[4];
  tensor.ndim = static_cast<int32_t>(array.ndim());
  if (tensor.ndim > 4) throw nb::value_error((std::string(name) + ": too many dimensions").c_str());
  for (size_t i = 0; i < array.ndim(); ++i) {
    sizes[i] = static_cast<int64_t>(array.shape(i));
    strides[i] = array.stride(i);
  }
  tensor.data = const_cast<void*>(static_cast<const void*>(array.data()));
  tensor.device = {array.device_type(), array.device_id()};
  tensor.dtype = array.dtype();
  tensor.shape = sizes;
  tensor.strides = strides;
  return checked(tensor, name, types, shape);
}

float_type as_float_type(element type) {
  switch (type) {
    case element::bf16:
      return float_type::bf16;
    case element::fp16:
      return float_type::fp16;
    default:
      return float_type::fp32;
  }
}

}  // namespace kt
