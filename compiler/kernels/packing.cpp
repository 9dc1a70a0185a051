// Lays weights out in the order in which the matmul reads them.
#include <algorithm>
#include <cstring>

#include "isa.h"
#include "quantized_layout.h"
#include "thread_pool.h"

namespace max_kernels {
namespace {

constexpr const char* kNoKernels = "MAX_KERNELS_ISA names an instruction set that this CPU lacks";

uint16_t round_to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if (value != value) return static_cast<uint16_t>((bits >> 16) | 0x40);  // rounding could make NaN infinite
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
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

int64_t packed_column(const Packing& call, int64_t column) {
  column += call.first_column;
  if (call.columns == Columns::kPlain) return column;
  const int64_t half = call.columns == Columns::kUp ? kHalfPanel : 0;
  return column / kHalfPanel * kPanelColumns + half + column % kHalfPanel;
}

// One column's block of inputs in GGUF's order: given so, or quantized into `made`.
const uint8_t* source_block(const Packing& call, int64_t column, int64_t block, uint8_t* made) {
  const BlockSize size = block_size(call.encoding);
  if (call.source_kind == Source::kBlocks) {
    const int64_t num_blocks = call.num_inputs / size.inputs;
    return static_cast<const uint8_t*>(call.source) + (column * num_blocks + block) * size.bytes;
  }
  const int64_t from = column * call.output_stride + block * size.inputs * call.input_stride;
  if (call.source_kind == Source::kF32 && call.input_stride == 1) {
    quantize_block(call.encoding, static_cast<const float*>(call.source) + from, made);
    return made;
  }
  float elements[kSuperBlocks * kBlockInputs];
  for (int64_t k = 0; k < size.inputs; ++k) elements[k] = read_f32(call, from + k * call.input_stride);
  quantize_block(call.encoding, elements, made);
  return made;
}

void pack_quantized(const Packing& call, int64_t first, int64_t last) {
  const BlockSize size = block_size(call.encoding);
  const int64_t num_blocks = call.num_inputs / size.inputs, panel_block = size.bytes * kPanelColumns;
  for (int64_t block = 0; block < num_blocks; ++block) {
    for (int64_t column = first; column < last; ++column) {
      uint8_t made[block_size(Encoding::kQ6K).bytes];
      const int64_t to = packed_column(call, column);
      uint8_t* out = call.packed + (to / kPanelColumns * num_blocks + block) * panel_block;
      const Block apart = read_block(call.encoding, source_block(call, column, block, made));
      write_block(call.encoding, apart, out, to % kPanelColumns);
    }
  }
}

void pack_columns(const Packing& call, int64_t first, int64_t last) {
  constexpr int64_t kBlock = 64;  // inputs, so that a block of a panel stays in the first-level cache
  const int64_t pairs = block_size(call.encoding).inputs;
  const int64_t rows = (call.num_inputs + pairs - 1) / pairs * pairs;
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

const char* name_of(Encoding encoding) {
  constexpr const char* names[kNumEncodings] = {"float32", "bfloat16", "q8_0", "q4_0", "q4_k", "q6_k"};
  return names[static_cast<int>(encoding)];
}

int64_t packed_bytes(Encoding encoding, Epilogue epilogue, int64_t num_inputs, int64_t num_outputs) {
  const int64_t width = is_gated(epilogue) ? kHalfPanel : kPanelColumns;
  const int64_t columns = (num_outputs + width - 1) / width * kPanelColumns;
  const BlockSize size = block_size(encoding);
  return columns * ((num_inputs + size.inputs - 1) / size.inputs) * size.bytes;
}

std::string pack(const Packing& call) {
  if (call.num_inputs < 0 || call.num_columns < 0 || call.first_column < 0 ||
      call.first_column + call.num_columns > call.total_columns) {
    return "the columns do not fit the packed matrix";
  }
  const bool quantized = is_quantized(call.encoding);
  const int64_t block = block_size(call.encoding).inputs;
  if (quantized && call.num_inputs % block != 0) {
    return std::string(name_of(call.encoding)) + " needs a multiple of " + std::to_string(block) + " inputs";
  }
  if (!quantized && call.source_kind == Source::kBlocks) return "blocks are packed in their own encoding";
  if (quantized && kernels() == nullptr) return kNoKernels;
  constexpr int64_t kChunk = kPanelColumns;
  parallel_for((call.num_columns + kChunk - 1) / kChunk, [&](int64_t i) {
    (quantized ? pack_quantized : pack_columns)(call, i * kChunk, std::min((i + 1) * kChunk, call.num_columns));
  });
  return "";
}

std::string quantize(Encoding encoding, const float* elements, int64_t num_elements, uint8_t* blocks) {
  const BlockSize size = block_size(encoding);
  if (!is_quantized(encoding) || num_elements < 0 || num_elements % size.inputs != 0) {
    return "only whole blocks of a quantized encoding can be made";
  }
  if (kernels() == nullptr) return kNoKernels;
  constexpr int64_t kChunk = 64;
  const int64_t num_blocks = num_elements / size.inputs;
  parallel_for((num_blocks + kChunk - 1) / kChunk, [&](int64_t chunk) {
    for (int64_t i = chunk * kChunk; i < std::min(num_blocks, (chunk + 1) * kChunk); ++i)
      quantize_block(encoding, elements + i * size.inputs, blocks + i * size.bytes);
  });
  return "";
}

}  // namespace max_kernels
