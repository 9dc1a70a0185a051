// Lays weights out in the order in which the matmul reads them.
#include <algorithm>
#include <cstring>

#include "kernels.h"
#include "thread_pool.h"

namespace max_kernels {
namespace {

uint16_t round_to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if (value != value) return static_cast<uint16_t>((bits >> 16) | 0x40);  // rounding could make NaN infinite
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

float read_f32(const Packing& call, int64_t at) {
  if (!call.source_is_bf16) return static_cast<const float*>(call.source)[at];
  const uint32_t bits = static_cast<uint32_t>(static_cast<const uint16_t*>(call.source)[at]) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

uint16_t read_bf16(const Packing& call, int64_t at) {
  if (call.source_is_bf16) return static_cast<const uint16_t*>(call.source)[at];
  return round_to_bf16(static_cast<const float*>(call.source)[at]);
}

int64_t padded_inputs(Encoding encoding, int64_t num_inputs) {
  return encoding == Encoding::kBf16 ? num_inputs + num_inputs % 2 : num_inputs;
}

int64_t packed_column(const Packing& call, int64_t column) {
  column += call.first_column;
  if (call.columns == Columns::kPlain) return column;
  const int64_t half = call.columns == Columns::kUp ? kHalfPanel : 0;
  return column / kHalfPanel * kPanelColumns + half + column % kHalfPanel;
}

void pack_columns(const Packing& call, int64_t first, int64_t last) {
  constexpr int64_t kBlock = 64;  // inputs, so that a block of a panel stays in the first-level cache
  const int64_t rows = padded_inputs(call.encoding, call.num_inputs);
  for (int64_t begin = 0; begin < call.num_inputs; begin += kBlock) {
    const int64_t end = std::min(begin + kBlock, call.num_inputs);
    for (int64_t column = first; column < last; ++column) {
      const int64_t to = packed_column(call, column);
      const int64_t panel = to / kPanelColumns * rows * kPanelColumns, lane = to % kPanelColumns;
      const int64_t from = column * call.output_stride;
      if (call.encoding == Encoding::kF32) {
        float* out = reinterpret_cast<float*>(call.packed) + panel + lane;
        for (int64_t k = begin; k < end; ++k) out[k * kPanelColumns] = read_f32(call, from + k * call.input_stride);
      } else {
        uint16_t* out = reinterpret_cast<uint16_t*>(call.packed) + panel + 2 * lane;
        for (int64_t k = begin; k < end; ++k)
          out[k / 2 * 2 * kPanelColumns + k % 2] = read_bf16(call, from + k * call.input_stride);
      }
    }
  }
}

}  // namespace

int64_t packed_bytes(Encoding encoding, Epilogue epilogue, int64_t num_inputs, int64_t num_outputs) {
  const int64_t width = epilogue == Epilogue::kSwiglu ? kHalfPanel : kPanelColumns;
  const int64_t columns = (num_outputs + width - 1) / width * kPanelColumns;
  return columns * padded_inputs(encoding, num_inputs) * (encoding == Encoding::kF32 ? 4 : 2);
}

std::string pack(const Packing& call) {
  if (call.num_inputs < 0 || call.num_columns < 0 || call.first_column < 0 ||
      call.first_column + call.num_columns > call.total_columns) {
    return "the columns do not fit the packed matrix";
  }
  constexpr int64_t kChunk = kPanelColumns;
  parallel_for((call.num_columns + kChunk - 1) / kChunk, [&](int64_t i) {
    pack_columns(call, i * kChunk, std::min((i + 1) * kChunk, call.num_columns));
  });
  return "";
}

}  // namespace max_kernels
