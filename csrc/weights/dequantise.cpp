// Reads panels line by line: the sixteen rows of a panel are written side by side.
#include "dequantise.h"

#include <algorithm>
#include <cstring>

#include "../float_types.h"
#include "../int4_gemm/int4_gemm.h"

namespace kt {
namespace {

// One panel: the first `rows` of its 16 outputs, k inputs.
struct panel_of {
  weight_format format;
  const char* packed;
  const char* scale;
  int64_t rows, k;
  uint16_t* out;
  int64_t out_stride;

  // q(lane, i): integer i of the four or eight that a line of 64 bytes has for each output.
  template <int per_line, typename function>
  void integers(const function& q) const {
    const float* scales = reinterpret_cast<const float*>(scale);
    const uint16_t* groups = reinterpret_cast<const uint16_t*>(scale);
    for (int64_t kk = 0; kk < k; kk += per_line) {
      const int8_t* line = reinterpret_cast<const int8_t*>(packed) + kk / per_line * 64;
      const int64_t count = std::min<int64_t>(per_line, k - kk);
      for (int64_t lane = 0; lane < rows; ++lane) {
        const float real =
            format.group_size ? bf16_to_float(groups[kk / format.group_size * panel_outputs + lane])
                              : scales[lane];
        uint16_t* row = out + lane * out_stride + kk;
        for (int64_t i = 0; i < count; ++i) {
          row[i] = float_to_bf16(static_cast<float>(q(line + lane * 4, i)) * real);
        }
      }
    }
  }

  void copy() const {
    for (int64_t kk = 0; kk < k; kk += 2) {
      const uint16_t* line = reinterpret_cast<const uint16_t*>(packed) + kk * panel_outputs;
      const size_t bytes = static_cast<size_t>(std::min<int64_t>(2, k - kk)) * sizeof(uint16_t);
      for (int64_t lane = 0; lane < rows; ++lane) {
        std::memcpy(out + lane * out_stride + kk, line + lane * 2, bytes);
      }
    }
  }
};

}  // namespace

void dequantise(weight_format format, packed_matrix matrix, int64_t n, int64_t k, uint16_t* out,
                int64_t out_stride) {
  // A panel is half of the 32 outputs that sizes are given for.
  const int64_t bytes = packed_bytes(format, gemm_n_multiple, k) / 2;
  const int64_t scale_bytes = scale_count(format, gemm_n_multiple, k) / 2 * scale_size(format);
  for (int64_t j = 0; j < n; j += panel_outputs) {
    const int64_t index = j / panel_outputs;
    const panel_of panel{format,
                         matrix.packed + index * bytes,
                         matrix.scale + index * scale_bytes,
                         std::min(panel_outputs, n - j),
                         k,
                         out + j * out_stride,
                         out_stride};
    switch (format.kind) {
      case weight_kind::int8:
        panel.integers<4>([](const int8_t* four, int64_t i) { return four[i]; });
        break;
      case weight_kind::int4:
        panel.integers<8>([](const int8_t* four, int64_t i) {
          const int both = static_cast<uint8_t>(four[i % 4]);
          return (i < 4 ? both & 15 : both >> 4) - int4_zero;
        });
        break;
      case weight_kind::bf16:
        panel.copy();
        break;
    }
  }
}

}  // namespace kt
