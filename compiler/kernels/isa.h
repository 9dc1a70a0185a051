// The instruction sets that the kernels are compiled for, and which of them this process uses.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "hints.h"
#include "kernels.h"

namespace max_kernels {

// 32 inputs of a row as the integer products take them: x ~ scale * values.
struct QuantizedInputs {
  int8_t values[32];
  int32_t start[2];  // of a sum of products: minus the values' sum times what codes stand above their weights; q6_k: halves
  float scale;
  float minus_sum;  // of scale * values, for the formats with a minimum
};

// x as panels read it: rows of float32, or of pairs of bfloat16 that convert_inputs made, `stride` floats or pairs
// apart. Quantized inputs are those of the panel's rows alone, in tiles of tile_rows(), [tile][K/32][rows of the tile].
struct MatmulInputs {
  const void* rows;
  int64_t stride;
  Hints hints;
};

// Rows [row_begin, row_end) of one panel of a matmul.
using MatmulPanel = void (*)(const Matmul& call, const MatmulInputs& inputs, int64_t panel, int64_t row_begin,
                             int64_t row_end);

// Consecutive tokens of one row, with the queries of some kv heads, and the keys of the row that any of them sees.
struct QueryTile {
  int64_t first_token;
  int64_t num_tokens;
  int64_t first_kv_head;
  int64_t num_kv_heads;
  int64_t first_key;
  int64_t last_key;
};

// A tile has at most this many queries, and visits keys in blocks of at most kBlockTokens: both fit the first cache.
constexpr int64_t kTileQueries = 48;
constexpr int64_t kBlockTokens = 64;
// Keys of a prompt that are written at a time: one dimension of so many float32 fills a cache line.
constexpr int64_t kKeysOfLine = 16;
// Keys that are summed up on their own, by any thread; and floats of a vector in such a sum.
constexpr int64_t kSegmentTokens = 512;
constexpr int64_t kPartVector = 16;

// The rows of a tile of quantized inputs: as many as a kernel takes at most, or fewer so that no tile has much fewer.
struct QuantizedTileRows {
  int64_t few;   // all in one tile up to here
  int64_t many;  // in each tile at most, of more rows than that
};
inline int64_t tile_rows(QuantizedTileRows most, int64_t rows) {
  const int64_t tiles = rows <= most.few ? 1 : (rows + most.many - 1) / most.many;
  return (rows + tiles - 1) / tiles;
}

struct Kernels {
  const char* name;
  MatmulPanel matmul_f32;
  MatmulPanel matmul_bf16;
  MatmulPanel matmul_quantized[kNumEncodings - static_cast<int>(Encoding::kQ8_0)];
  // Rounds a row of x to bfloat16, with a zero behind an odd K; null where the kernel reads float32.
  void (*convert_inputs)(const float* x, int64_t count, uint16_t* converted);
  QuantizedTileRows quantized_tile_rows;
  // Blocks of 32 inputs of a row, each `stride` behind the one before.
  void (*quantize_inputs)(const float* x, int64_t num_blocks, Encoding weights, QuantizedInputs* quantized,
                          int64_t stride);
  // GGUF's block of as many weights as a block has; the same bits on every instruction set.
  void (*quantize_block)(Encoding encoding, const float* elements, uint8_t* gguf);
  // Writes the rotated keys and the values of tokens [first, end), none of them padding, into the pages.
  void (*write_tokens)(const Attention& call, int64_t first, int64_t end);
  // Attends with a tile's queries; scratch holds attention_scratch() floats, 64-byte aligned.
  void (*attend)(const Attention& call, const QueryTile& tile, float* scratch);
  // The same in two halves: sums over a segment of the keys, attention_part() floats, and the results of all sums,
  // which lie part_stride floats apart.
  void (*attend_segment)(const Attention& call, const QueryTile& tile, int64_t segment, float* scratch, float* part);
  void (*merge_segments)(const Attention& call, const QueryTile& tile, float* parts, int64_t part_stride,
                         float* scratch);
  // The index of the first highest value, or -1 where one is NaN; count > 0.
  int64_t (*argmax_row)(const float* x, int64_t count);
  // A token of a row, drawn at u in [0, 1), or -1 where none can be; scratch holds sample_scratch() floats, 64-byte aligned.
  int32_t (*sample_row)(const Sampling& call, int64_t row, double u, float* scratch);
  // The log probabilities of a row; scratch holds logprobs_scratch() floats, 64-byte aligned.
  void (*logprobs_row)(const Logprobs& call, int64_t row, float* scratch);
  // One row of a norm.
  void (*norm_row)(const RmsNorm& call, int64_t row);
  // Reads memory once, but for a tail of less than 512 bytes; the result only keeps the reads alive.
  uint32_t (*read)(const void* memory, int64_t bytes);
};

extern const Kernels kBaselineKernels;
#if defined(__x86_64__) && !defined(MAX_KERNELS_PORTABLE)
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
extern const Kernels kAvx512VnniKernels;
extern const Kernels kAvx512Bf16Kernels;
#endif

// Floats of scratch that `attend` needs for any tile of the call, and of a segment's sums, for every instruction set.
int64_t attention_scratch(const Attention& call);
int64_t attention_part(const Attention& call);

// Floats of scratch that `sample_row` and `logprobs_row` need.
int64_t sample_scratch(const Sampling& call);
int64_t logprobs_scratch(const Logprobs& call);

// The kernels in use: the best that the CPU can run, or those of MAX_KERNELS_ISA; null if that one cannot be used.
const Kernels* kernels();

// Chooses an instruction set by name, or by MAX_KERNELS_ISA and the CPU if the name is empty; returns what is wrong.
std::string select_isa(const std::string& name);

bool isa_is_supported(const std::string& name);

}  // namespace max_kernels
