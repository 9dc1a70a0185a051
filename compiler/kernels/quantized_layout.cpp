// Moves blocks from GGUF's order into that of a panel, and reads single columns of a panel.
#include "quantized_layout.h"

#include <cstring>

#include "quantize.h"

namespace max_kernels {
namespace {

// GGUF keeps the lower halves of bytes for the first `count` codes and the upper halves for the next ones.
void split_halves(const uint8_t* bytes, int64_t count, uint8_t* codes) {
  for (int64_t i = 0; i < count; ++i) {
    codes[i] = bytes[i] & 15;
    codes[count + i] = bytes[i] >> 4;
  }
}

void read_q4k(const uint8_t* gguf, Block& block) {
  std::memcpy(&block.scale, gguf, 2);
  std::memcpy(&block.minimum, gguf + 2, 2);
  const uint8_t* packed = gguf + 4;  // 8 scales and 8 minima of 6 bits
  for (int64_t i = 0; i < kSuperBlocks / 2; ++i) {
    block.scales[i] = packed[i] & 63;
    block.minima[i] = packed[4 + i] & 63;
    block.scales[4 + i] = static_cast<uint8_t>((packed[8 + i] & 15) | (packed[i] >> 6 << 4));
    block.minima[4 + i] = static_cast<uint8_t>((packed[8 + i] >> 4) | (packed[4 + i] >> 6 << 4));
  }
  for (int64_t i = 0; i < 4; ++i) split_halves(gguf + 16 + i * 32, 32, block.codes + i * 64);
}

void read_q6k(const uint8_t* gguf, Block& block) {
  for (int64_t half = 0; half < 2; ++half) {
    uint8_t* codes = block.codes + half * 128;
    const uint8_t* upper = gguf + 128 + half * 32;
    split_halves(gguf + half * 64, 64, codes);
    for (int64_t i = 0; i < 128; ++i) codes[i] |= static_cast<uint8_t>((upper[i % 32] >> (i / 32 * 2) & 3) << 4);
  }
  std::memcpy(block.scales, gguf + 192, sizeof block.scales);
  std::memcpy(&block.scale, gguf + 208, 2);
}

void write_f16(uint8_t* scales, int64_t lane, uint16_t value) { std::memcpy(scales + lane * 2, &value, sizeof value); }

void write_bytes(const uint8_t* codes, uint8_t* to) {
  for (int64_t k = 0; k < kBlockInputs; k += kStepInputs, to += kStepBytes) std::memcpy(to, codes + k, kStepInputs);
}

void write_nibbles(const uint8_t* codes, uint8_t* to) {
  for (int64_t k = 0; k < kBlockInputs; k += 2 * kStepInputs, to += kStepBytes) {
    for (int64_t i = 0; i < kStepInputs; ++i)
      to[i] = static_cast<uint8_t>((codes[k + i] & 15) | (codes[k + kStepInputs + i] << 4));
  }
}

void write_upper_bits(const uint8_t* codes, uint8_t* to) {
  for (int64_t k = 0; k < kBlockInputs; k += 4 * kStepInputs, to += kStepBytes) {
    for (int64_t i = 0; i < kStepInputs; ++i) {
      uint8_t bits = 0;
      for (int64_t step = 0; step < 4; ++step) bits |= codes[k + step * kStepInputs + i] >> 4 << (2 * step);
      to[i] = bits;
    }
  }
}

void write_q4k(const Block& block, uint8_t* to, int64_t lane) {
  write_f16(to, lane, block.scale);
  write_f16(to + kScaleBytes, lane, block.minimum);
  uint8_t* scales = to + 2 * kScaleBytes + lane;
  uint8_t* minima = scales + kSuperBlocks * kPanelColumns;
  for (int64_t i = 0; i < kSuperBlocks; ++i) {
    scales[i * kPanelColumns] = static_cast<uint8_t>(block.scales[i] | (block.minima[i] >> 4 << 6));
    write_nibbles(block.codes + i * kBlockInputs, to + kQ4KHeaderBytes + i * kNibbleBytes + lane * kStepInputs);
  }
  for (int64_t i = 0; i < kSuperBlocks; i += 2)
    minima[i / 2 * kPanelColumns] = static_cast<uint8_t>((block.minima[i] & 15) | (block.minima[i + 1] << 4));
}

void write_q6k(const Block& block, uint8_t* to, int64_t lane) {
  write_f16(to, lane, block.scale);
  for (int64_t i = 0; i < 2 * kSuperBlocks; ++i) to[kScaleBytes + i * kPanelColumns + lane] = block.scales[i];
  for (int64_t i = 0; i < kSuperBlocks; ++i) {
    const uint8_t* codes = block.codes + i * kBlockInputs;
    uint8_t* out = to + kQ6KHeaderBytes + i * kQ6KBlockBytes + lane * kStepInputs;
    write_nibbles(codes, out);
    write_upper_bits(codes, out + kNibbleBytes);
  }
}

float read_f16(const uint8_t* scales, int64_t lane) {
  uint16_t half;
  std::memcpy(&half, scales + lane * 2, sizeof half);
  return widen_f16(half);
}

// Code `k` of a column's 32, whose steps start at `codes`.
int code_of_byte(const uint8_t* codes, int64_t k) { return codes[k / kStepInputs * kStepBytes + k % kStepInputs]; }

int code_of_nibble(const uint8_t* codes, int64_t k) {
  const int both = codes[k / (2 * kStepInputs) * kStepBytes + k % kStepInputs];
  return k / kStepInputs % 2 == 0 ? both & 15 : both >> 4;
}

int upper_bits(const uint8_t* codes, int64_t k) {
  return codes[k / (4 * kStepInputs) * kStepBytes + k % kStepInputs] >> (k / kStepInputs % 4 * 2) & 3;
}

void read_q4k_weights(const uint8_t* at, int64_t lane, float* weights) {
  const float scale = read_f16(at, lane), minimum = read_f16(at + kScaleBytes, lane);
  const uint8_t* scales = at + 2 * kScaleBytes + lane;
  const uint8_t* minima = scales + kSuperBlocks * kPanelColumns;
  for (int64_t i = 0; i < kSuperBlocks; ++i) {
    const int upper = scales[i * kPanelColumns] >> 6, lower = minima[i / 2 * kPanelColumns] >> (i % 2 * 4) & 15;
    const float step = scale * static_cast<float>(scales[i * kPanelColumns] & 63);
    const float low = minimum * static_cast<float>(upper << 4 | lower);
    const uint8_t* codes = at + kQ4KHeaderBytes + i * kNibbleBytes + lane * kStepInputs;
    for (int64_t k = 0; k < kBlockInputs; ++k)
      weights[i * kBlockInputs + k] = step * static_cast<float>(code_of_nibble(codes, k)) - low;
  }
}

void read_q6k_weights(const uint8_t* at, int64_t lane, float* weights) {
  const float scale = read_f16(at, lane);
  for (int64_t i = 0; i < kSuperBlocks; ++i) {
    const uint8_t* codes = at + kQ6KHeaderBytes + i * kQ6KBlockBytes + lane * kStepInputs;
    for (int64_t k = 0; k < kBlockInputs; ++k) {
      const uint8_t own = at[kScaleBytes + (2 * i + k / 16) * kPanelColumns + lane];
      const int code = code_of_nibble(codes, k) | upper_bits(codes + kNibbleBytes, k) << 4;
      weights[i * kBlockInputs + k] = scale * static_cast<float>(static_cast<int8_t>(own)) * static_cast<float>(code - 32);
    }
  }
}

}  // namespace

Block read_block(Encoding encoding, const uint8_t* gguf) {
  Block block{};
  if (encoding == Encoding::kQ4K) {
    read_q4k(gguf, block);
  } else if (encoding == Encoding::kQ6K) {
    read_q6k(gguf, block);
  } else {
    std::memcpy(&block.scale, gguf, 2);
    if (encoding == Encoding::kQ4_0) {
      split_halves(gguf + 2, 16, block.codes);
    } else {
      for (int64_t k = 0; k < kBlockInputs; ++k) block.codes[k] = gguf[2 + k] ^ 0x80;
    }
  }
  return block;
}

void write_block(Encoding encoding, const Block& block, uint8_t* panel_block, int64_t lane) {
  if (encoding == Encoding::kQ4K) return write_q4k(block, panel_block, lane);
  if (encoding == Encoding::kQ6K) return write_q6k(block, panel_block, lane);
  write_f16(panel_block, lane, block.scale);
  (encoding == Encoding::kQ8_0 ? write_bytes : write_nibbles)(block.codes,
                                                              panel_block + kScaleBytes + lane * kStepInputs);
}

void read_weights(Encoding encoding, const uint8_t* panel_block, int64_t lane, float* weights) {
  if (encoding == Encoding::kQ4K) return read_q4k_weights(panel_block, lane, weights);
  if (encoding == Encoding::kQ6K) return read_q6k_weights(panel_block, lane, weights);
  const float scale = read_f16(panel_block, lane);
  const uint8_t* codes = panel_block + kScaleBytes + lane * kStepInputs;
  for (int64_t k = 0; k < kBlockInputs; ++k) {
    const int weight = encoding == Encoding::kQ8_0 ? code_of_byte(codes, k) - 128 : code_of_nibble(codes, k) - 8;
    weights[k] = scale * static_cast<float>(weight);
  }
}

}  // namespace max_kernels
