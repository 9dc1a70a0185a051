// Rows of an embedding out of a packed matrix, which may be that of the head too: a token is a column of a panel.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "quantized_layout.h"
#include "thread_pool.h"

namespace max_kernels {
namespace {

float widen_bf16(uint16_t half) {
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

void read_floats(const Embedding& call, int64_t panel, int64_t lane, float* row) {
  const uint8_t* at = call.weights + 4 * (panel * call.num_inputs * kPanelColumns + lane);
  for (int64_t k = 0; k < call.num_inputs; ++k) std::memcpy(row + k, at + 4 * k * kPanelColumns, 4);
}

void read_halves(const Embedding& call, int64_t panel, int64_t lane, float* row) {
  const int64_t pairs = (call.num_inputs + 1) / 2;
  const uint8_t* at = call.weights + 4 * (panel * pairs * kPanelColumns + lane);
  for (int64_t k = 0; k < call.num_inputs; ++k) {
    uint16_t half;
    std::memcpy(&half, at + 4 * (k / 2) * kPanelColumns + 2 * (k % 2), sizeof half);
    row[k] = widen_bf16(half);
  }
}

void read_blocks(const Embedding& call, int64_t panel, int64_t lane, float* row) {
  const BlockSize size = block_size(call.encoding);
  const int64_t num_blocks = call.num_inputs / size.inputs, panel_block = size.bytes * kPanelColumns;
  const uint8_t* at = call.weights + panel * num_blocks * panel_block;
  for (int64_t b = 0; b < num_blocks; ++b)
    read_weights(call.encoding, at + b * panel_block, lane, row + b * size.inputs);
}

void read_row(const Embedding& call, int64_t token) {
  const int64_t id = call.ids[token], panel = id / kPanelColumns, lane = id % kPanelColumns;
  float* row = call.y + token * call.num_inputs;
  if (id < 0 || id >= call.num_outputs) {
    std::fill(row, row + call.num_inputs, NAN);
  } else if (call.encoding == Encoding::kF32) {
    read_floats(call, panel, lane, row);
  } else if (call.encoding == Encoding::kBf16) {
    read_halves(call, panel, lane, row);
  } else {
    read_blocks(call, panel, lane, row);
  }
}

}  // namespace

std::string embed(const Embedding& call) {
  if (call.num_inputs < 1 || call.num_outputs < 1) return "an embedding has rows and columns";
  if (call.num_inputs % block_size(call.encoding).inputs != 0 && is_quantized(call.encoding)) {
    return std::string(name_of(call.encoding)) + " needs whole blocks of inputs";
  }
  const int64_t expected = packed_bytes(call.encoding, Epilogue::kNone, call.num_inputs, call.num_outputs);
  if (call.weight_bytes != expected) {
    return "packed weights of " + std::to_string(call.weight_bytes) + " bytes, expected " + std::to_string(expected) +
           " for " + std::to_string(call.num_inputs) + " inputs and " + std::to_string(call.num_outputs) + " outputs";
  }
  constexpr int64_t kChunk = 8;  // a row takes a few microseconds
  parallel_for((call.num_tokens + kChunk - 1) / kChunk, [&](int64_t chunk) {
    const int64_t end = std::min(call.num_tokens, (chunk + 1) * kChunk);
    for (int64_t token = chunk * kChunk; token < end; ++token) read_row(call, token);
  });
  return "";
}

}  // namespace max_kernels
