// The operations of the library, independent of XLA: what they take, and what they promise.
//
// Every function validates its arguments and returns an empty string, or what is wrong with them. Each row (matmul)
// and each token (attention) is accumulated in one order of its own: the same bits whatever else is in the call and
// however many threads run it. The order may differ between instruction sets.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace max_kernels {

enum class Encoding : int { kF32 = 0, kBf16 = 1, kQ8_0 = 2, kQ4_0 = 3, kQ4K = 4, kQ6K = 5 };
constexpr int kNumEncodings = 6;

// The last three are of a gated layer: y = f(gate) * up, with f silu (SwiGLU), or gelu by tanh or exactly (GeGLU).
enum class Epilogue : int { kNone = 0, kBias = 1, kSwiglu = 2, kGegluTanh = 3, kGegluErf = 4 };
constexpr int kNumEpilogues = 5;
constexpr bool is_gated(Epilogue epilogue) { return epilogue >= Epilogue::kSwiglu; }

// Weights lie in panels of 32 outputs, which quantized_layout.h describes for the formats of GGUF; f32 as [N/32][K][32],
// bf16 as [N/32][K/2][32][2]; missing outputs and inputs are 0.
constexpr int64_t kPanelColumns = 32;
// With a gated epilogue a panel holds 16 columns of the gate, then the same 16 of the up projection.
constexpr int64_t kHalfPanel = kPanelColumns / 2;

// Inputs of a column that an encoding keeps together, in GGUF's blocks, and their bytes.
struct BlockSize {
  int64_t inputs;
  int64_t bytes;
};
constexpr BlockSize block_size(Encoding encoding) {
  constexpr BlockSize sizes[kNumEncodings] = {{1, 4}, {2, 4}, {32, 34}, {32, 18}, {256, 144}, {256, 210}};
  return sizes[static_cast<int>(encoding)];
}
// The last dimension of packed weights as an array: it tells the encodings apart.
constexpr int64_t bytes_per_element(Encoding encoding) {
  return encoding == Encoding::kBf16 ? 2 : block_size(encoding).bytes;
}
constexpr bool is_quantized(Encoding encoding) { return encoding >= Encoding::kQ8_0; }
const char* name_of(Encoding encoding);

// y (M, N) = x (M, K) @ W, + bias (N,) or gated (W has 2 N columns, y = f(gate) * up); x, bias, y float32. With quantized
// weights x is rounded to int8, in blocks of 32 inputs that share a scale of their largest magnitude / 127.
struct Matmul {
  Encoding encoding;
  Epilogue epilogue;
  const float* x;
  const uint8_t* weights;
  const float* bias;
  float* y;
  int64_t num_rows;     // M
  int64_t num_inputs;   // K
  int64_t num_outputs;  // N
  int64_t weight_bytes;
};
std::string matmul(const Matmul& call);

// Bytes of a packed matrix; with a gated epilogue `num_outputs` is the width of y, and the matrix holds gate and up.
// Quantized matrices need whole blocks of inputs.
int64_t packed_bytes(Encoding encoding, Epilogue epilogue, int64_t num_inputs, int64_t num_outputs);

// What a matrix is made of before it is packed: elements, or GGUF's blocks of the same encoding.
enum class Source : int { kF32 = 0, kBf16 = 1, kBlocks = 2 };

enum class Columns : int { kPlain = 0, kGate = 1, kUp = 2 };

// Some columns of a matrix in memory, and where they go in the packed one. Strides count elements; blocks
// lie column after column, without strides.
struct Packing {
  Encoding encoding;
  Columns columns;
  Source source_kind;
  const void* source;
  int64_t input_stride;
  int64_t output_stride;
  int64_t num_inputs;     // K
  int64_t num_columns;    // of the source
  int64_t first_column;   // of the packed matrix; kGate, kUp: of y
  int64_t total_columns;  // N of the packed matrix; kGate, kUp: the width of y
  uint8_t* packed;        // packed_bytes(), zeroed by the caller where the source does not reach
};
std::string pack(const Packing& call);

// GGUF's blocks of `num_elements` floats, as `pack` makes them; for q8_0 and q4_0 those of GGUF's own quantizer.
std::string quantize(Encoding encoding, const float* elements, int64_t num_elements, uint8_t* blocks);

// Rows of a packed matrix's transpose: y (T, K) is W[:, ids], exactly as `pack` has kept it; NaN for an id out of range.
struct Embedding {
  Encoding encoding;
  const int32_t* ids;  // (T,)
  const uint8_t* weights;
  float* y;
  int64_t num_tokens;   // T
  int64_t num_inputs;   // K
  int64_t num_outputs;  // N
  int64_t weight_bytes;
};
std::string embed(const Embedding& call);

// Causal attention of T tokens over the pages of their rows, after rotating q and k and writing k and v. Over pages of
// bfloat16, instruction sets with products of bfloat16 round queries and the weights of values to it.
struct Attention {
  const float* qkv;           // (T, (N + 2 K) H): queries, keys, values
  const float* cos;           // (T, rotary_dim / 2); pairs are (i, i + rotary_dim / 2), as in NeoX
  const float* sin;           // the same
  const int32_t* page_table;  // (max_rows, max_pages)
  const int32_t* rows;        // (T,) row of each token, -1 for padding
  const int32_t* positions;   // (T,) position of each token in its row
  const int32_t* slots;       // (T,) page * page_tokens + offset; that of padding is not written
  void* pages;                // (num_pages, 2, K, page_tokens, H) float32 or bfloat16; attention_pages.h says how keys lie
  float* out;                 // (T, N H); zero for padding
  int64_t num_tokens;
  int64_t num_heads;     // N
  int64_t num_kv_heads;  // K, divides N
  int64_t head_dim;      // H
  int64_t rotary_dim;    // even, at most H
  int64_t num_pages;
  int64_t page_tokens;
  int64_t max_rows;
  int64_t max_pages;
  bool pages_are_bf16;
  float scale;         // on the scores, usually H ** -0.5
  float softcap;       // scores become softcap * tanh(score / softcap); 0 for none
  int64_t window;      // tokens that a token sees, itself the last of them; 0 for all
  const float* sinks;  // (N,) a score of each head that takes weight and gives no value; may be null
};
std::string attention(const Attention& call);

// y = x / sqrt(mean(x ** 2) + epsilon) * weight, row by row; with a delta, of x + delta, which is kept in `sum`.
struct RmsNorm {
  const float* x;       // (num_rows, width)
  const float* delta;   // the same, or null
  const float* weight;  // (width,)
  float* sum;           // (num_rows, width), perhaps x itself; null without a delta
  float* y;             // (num_rows, width)
  int64_t num_rows;
  int64_t width;
  float epsilon;
};
std::string rms_norm(const RmsNorm& call);

// A packed matrix: where its panels are, and their bytes.
struct Matrix {
  Encoding encoding;
  const uint8_t* weights;
  int64_t weight_bytes;
};

// One layer of a pre-norm decoder without biases.
struct DecoderLayer {
  const float* input_norm;  // (D,)
  Matrix qkv;               // (D, (N + 2 K) H)
  Matrix o;                 // (N H, D)
  const float* post_norm;   // (D,)
  Matrix gate_up;           // (D, 2 F), gated
  Matrix down;              // (F, D)
  void* pages;              // as in Attention
};

// The layers of a decoder one after the other, for steps so short that calling each operation by itself takes a part of
// the time: the same bits as rms_norm, matmul and attention give.
struct DecoderLayers {
  const DecoderLayer* layers;
  int64_t num_layers;
  const float* x;       // (T, D) residual stream
  float* y;             // (T, D), perhaps x itself
  Attention attention;  // of every layer, but for `qkv`, `pages` and `out`
  int64_t width;        // D
  int64_t mlp_width;    // F
  Epilogue gate;
  float epsilon;
};
std::string decode_layers(const DecoderLayers& call);

// The index of each row's first highest value, or -1 for a row with a NaN. x: (num_rows, num_columns); result: (num_rows,)
std::string argmax(const float* x, int64_t num_rows, int64_t num_columns, int32_t* result);

// How a row's token is drawn.
struct SampleSettings {
  float temperature;  // 0 for the most likely token
  float top_p;        // 1 for all
  float min_p;        // 0 for all
  float repetition;   // divides positive and multiplies negative logits of tokens that occurred; 1 for none
  float frequency;    // subtracted for each occurrence in the output
  float presence;     // subtracted once for those
};
struct SampleNumbers {
  int32_t top_k;  // 0 for all
  int32_t position;
  uint32_t seed[2];
  int32_t adjusted;  // the row of history and bias, or -1 for none
};

// One token for each row of logits, drawn by the inverse of the cumulative distribution at a uniform number that seed and
// position alone decide. A row gives -1 when a token that may come has a NaN, or when there is none of a finite value to
// draw from.
struct Sampling {
  const float* logits;             // (num_rows, num_columns)
  const int32_t* mask;             // (num_rows, ceil(num_columns / 32)), bit c % 32 of word c / 32: may c come?
  const int32_t* history;          // (num_adjusted, num_columns): 2 x occurrences in the output, + 1 if in the prompt
  const float* bias;               // (num_adjusted, num_columns), added behind the penalties
  const SampleSettings* settings;  // (num_rows,)
  const SampleNumbers* numbers;    // (num_rows,)
  int32_t* ids;                    // (num_rows,)
  int64_t num_rows;
  int64_t num_columns;
  int64_t num_adjusted;
};
std::string sample(const Sampling& call);

// Log-softmax of each row of (num_rows, num_columns) logits, at the row's own id and at its highest values, of which
// the first of equal ones come first. NaN counts as the lowest number; an id of -1, of a row that gave no token, as 0.
struct Logprobs {
  const float* logits;
  const int32_t* ids;  // (num_rows,)
  float* chosen;       // (num_rows,)
  int32_t* top_ids;    // (num_rows, num_top)
  float* top;          // (num_rows, num_top)
  int64_t num_rows;
  int64_t num_columns;
  int64_t num_top;  // at most num_columns
};
std::string logprobs(const Logprobs& call);

}  // namespace max_kernels
