// Lays weights out in the order in which the matmul reads them.
#include <algorithm>
#include <cmath>
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

// To nearest, ties to even; the scales that this is for are neither NaN nor too large for float16.
uint16_t round_to_f16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if (bits < (uint32_t{113} << 23)) {  // below 2**-14 the last bit stands for 2**-24
    return static_cast<uint16_t>(std::nearbyint(value * 0x1p24f));
  }
  bits -= uint32_t{112} << 23;
  return static_cast<uint16_t>((bits + 0xfff + ((bits >> 13) & 1)) >> 13);
}

float read_f32(const Packing& call, int64_t at) {
  if (call.source_kind == Source::kF32) return static_cast<const float*>(call.source)[at];
  const uint32_t bits = static_cast<uint32_t>(static_cast<const uint16_t*>(call.source)[at]) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

uint16_t read_bf16(const Packing& call, int64_t at) {
  if (call.source_kind == Source::kBf16) return static_cast<const uint16_t*>(call.source)[at];
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

uint8_t* q8_block(const Packing& call, int64_t column, int64_t block) {
  return call.packed + (column / kPanelColumns * (call.num_inputs / kQ8Inputs) + block) * kQ8BlockBytes;
}

// As GGUF's reference does it: a scale of the largest magnitude / 127, halves away from zero.
void quantize_q8(const Packing& call, int64_t from, uint16_t& scale, int8_t (&values)[kQ8Inputs]) {
  float elements[kQ8Inputs], largest = 0;
  for (int64_t k = 0; k < kQ8Inputs; ++k) {
    elements[k] = read_f32(call, from + k * call.input_stride);
    largest = std::max(largest, std::fabs(elements[k]));
  }
  const float unit = largest / 127, per_unit = unit == 0 ? 0 : 1 / unit;
  scale = round_to_f16(unit);
  for (int64_t k = 0; k < kQ8Inputs; ++k) values[k] = static_cast<int8_t>(std::round(elements[k] * per_unit));
}

void pack_q8_columns(const Packing& call, int64_t first, int64_t last) {
  const int64_t num_blocks = call.num_inputs / kQ8Inputs;
  for (int64_t block = 0; block < num_blocks; ++block) {
    for (int64_t column = first; column < last; ++column) {
      uint16_t scale;
      int8_t values[kQ8Inputs];
      if (call.source_kind == Source::kQ8_0) {
        const uint8_t* given = static_cast<const uint8_t*>(call.source) + (column * num_blocks + block) * kQ8SourceBytes;
        std::memcpy(&scale, given, sizeof scale);
        std::memcpy(values, given + sizeof scale, sizeof values);
      } else {
        quantize_q8(call, column * call.output_stride + block * kQ8Inputs * call.input_stride, scale, values);
      }
      const int64_t to = packed_column(call, column), lane = to % kPanelColumns;
      uint8_t* out = q8_block(call, to, block);
      std::memcpy(out + lane * sizeof scale, &scale, sizeof scale);
      out += kPanelColumns * sizeof scale + lane;
      for (int64_t k = 0; k < kQ8Inputs; ++k) out[k * kPanelColumns] = static_cast<uint8_t>(values[k]);
    }
  }
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
  if (encoding == Encoding::kQ8_0) return columns / kPanelColumns * (num_inputs / kQ8Inputs) * kQ8BlockBytes;
  return columns * padded_inputs(encoding, num_inputs) * (encoding == Encoding::kF32 ? 4 : 2);
}

std::string pack(const Packing& call) {
  if (call.num_inputs < 0 || call.num_columns < 0 || call.first_column < 0 ||
      call.first_column + call.num_columns > call.total_columns) {
    return "the columns do not fit the packed matrix";
  }
  const bool q8 = call.encoding == Encoding::kQ8_0;
  if (q8 && call.num_inputs % kQ8Inputs != 0) return "q8_0 needs a multiple of 32 inputs";
  if (!q8 && call.source_kind == Source::kQ8_0) return "blocks of q8_0 are packed as q8_0";
  constexpr int64_t kChunk = kPanelColumns;
  parallel_for((call.num_columns + kChunk - 1) / kChunk, [&](int64_t i) {
    (q8 ? pack_q8_columns : pack_columns)(call, i * kChunk, std::min((i + 1) * kChunk, call.num_columns));
  });
  return "";
}

}  // namespace max_kernels
