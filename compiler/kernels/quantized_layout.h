// How the blocks of GGUF's formats lie in a panel of 32 outputs, so that a vector holds four inputs of each of its
// columns, as integer products take them.
//
// codes: 32 inputs are 8 steps of 4, and a step is [32 columns][4 inputs] bytes. Half bytes hold two steps, the even one
// in the lower halves.
//   q8_0: [K/32] of {scales: 32 float16; codes + 128: 8 steps of bytes}
//   q4_0: [K/32] of {scales: 32 float16; codes: 4 x 2 steps of half bytes}, each 8 above its weight
//   q4_k: [K/256] of {scale: 32 float16; minimum: 32 float16; [8][32]: 6 bits of a block's scale, 2 upper bits of its
//         minimum; [4][32]: 4 lower bits of the minima of 2 blocks; 8 blocks of codes as in q4_0}
//   q6_k: [K/256] of {scale: 32 float16; [16][32] int8 scales of 16 inputs; 8 blocks of {lower 4 bits of codes as in q4_0;
//         upper 2 bits: 2 x 4 steps, the first in the lowest bits}}, each 32 above its weight
// Every part starts at a multiple of 64 bytes.
#pragma once

#include "kernels.h"

namespace max_kernels {

constexpr int64_t kBlockInputs = 32;
constexpr int64_t kStepInputs = 4;
constexpr int64_t kBlockSteps = kBlockInputs / kStepInputs;
constexpr int64_t kStepBytes = kStepInputs * kPanelColumns;
constexpr int64_t kScaleBytes = 2 * kPanelColumns;
constexpr int64_t kNibbleBytes = kBlockInputs * kPanelColumns / 2;

constexpr int64_t kQ8Bytes = kScaleBytes + kBlockInputs * kPanelColumns;
constexpr int64_t kQ4Bytes = kScaleBytes + kNibbleBytes;

constexpr int64_t kSuperBlocks = 8;  // blocks of 32 inputs in a block of 256
constexpr int64_t kQ4KHeaderBytes = 2 * kScaleBytes + (kSuperBlocks + kSuperBlocks / 2) * kPanelColumns;
constexpr int64_t kQ4KBytes = kQ4KHeaderBytes + kSuperBlocks * kNibbleBytes;
constexpr int64_t kQ6KHeaderBytes = kScaleBytes + 2 * kSuperBlocks * kPanelColumns;
constexpr int64_t kQ6KBlockBytes = kNibbleBytes + kNibbleBytes / 2;
constexpr int64_t kQ6KBytes = kQ6KHeaderBytes + kSuperBlocks * kQ6KBlockBytes;

static_assert(kQ8Bytes == kPanelColumns * block_size(Encoding::kQ8_0).bytes, "packed weights are as large as GGUF's");
static_assert(kQ4Bytes == kPanelColumns * block_size(Encoding::kQ4_0).bytes, "");
static_assert(kQ4KBytes == kPanelColumns * block_size(Encoding::kQ4K).bytes, "");
static_assert(kQ6KBytes == kPanelColumns * block_size(Encoding::kQ6K).bytes, "");

// Rows that are multiplied with a panel in one go, and the blocks of it that are unpacked for them at a time: the blocks,
// a tile's inputs and sums fit the first-level cache, all inputs the second.
constexpr int64_t kQuantizedBlockRows = 192;
constexpr int64_t kUnpackedBlocks = 16;

// One column's block with its codes apart, between GGUF's order and that of a panel.
struct Block {
  uint16_t scale;    // float16
  uint16_t minimum;  // float16; q4_k
  uint8_t scales[2 * kSuperBlocks];
  uint8_t minima[kSuperBlocks];
  uint8_t codes[kSuperBlocks * kBlockInputs];  // without a sign, as they lie in the panel
};
Block read_block(Encoding encoding, const uint8_t* gguf);
// `lane` is the column's place in the panel, whose blocks of inputs start at `panel_block`.
void write_block(Encoding encoding, const Block& block, uint8_t* panel_block, int64_t lane);
// The weights of a column's block in a panel, as many as a block has inputs.
void read_weights(Encoding encoding, const uint8_t* panel_block, int64_t lane, float* weights);

// GGUF's block of the elements, as many as a block has inputs.
void quantize_block(Encoding encoding, const float* elements, uint8_t* gguf);

}  // namespace max_kernels
