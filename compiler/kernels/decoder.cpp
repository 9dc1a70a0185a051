// The layers of a decoder as one call: nothing happens between two operations but the next one.
#include <algorithm>

#include "kernels.h"
#include "scratch.h"

namespace max_kernels {
namespace {

constexpr int64_t kLine = 16;  // floats of a cache line

// The values between the operations of a layer.
struct Between {
  float *normed, *qkv, *attended, *mlp, *delta;
};

int64_t query_width(const Attention& call) { return call.num_heads * call.head_dim; }
int64_t qkv_width(const Attention& call) { return query_width(call) + 2 * call.num_kv_heads * call.head_dim; }

Between room_between(const DecoderLayers& call) {
  static thread_local Scratch scratch;
  const int64_t tokens = call.attention.num_tokens;
  const auto room = [&](int64_t width) { return (tokens * width + kLine - 1) / kLine * kLine; };
  const int64_t qkv = room(qkv_width(call.attention)), queries = room(query_width(call.attention));
  const int64_t width = room(call.width), mlp = room(call.mlp_width);
  float* at = static_cast<float*>(scratch.at_least((2 * width + qkv + queries + mlp) * sizeof(float)));
  return {at, at + width, at + width + qkv, at + width + qkv + queries, at + width + qkv + queries + mlp};
}

std::string multiply(const DecoderLayers& call, const Matrix& matrix, const float* x, int64_t inputs, float* y,
                     int64_t outputs, Epilogue epilogue = Epilogue::kNone) {
  return matmul({matrix.encoding, epilogue, x, matrix.weights, nullptr, y, call.attention.num_tokens, inputs, outputs,
                 matrix.weight_bytes});
}

// The residual stream is in y, but for what the operation before has left in between.delta; `adds` is false where there
// was none. The layer leaves both in the same places.
std::string decode_layer(const DecoderLayers& call, const DecoderLayer& layer, bool adds, const Between& between) {
  const int64_t tokens = call.attention.num_tokens, width = call.width;
  const auto norm = [&](const float* weight, bool with_delta) {
    return rms_norm({call.y, with_delta ? between.delta : nullptr, weight, with_delta ? call.y : nullptr,
                     between.normed, tokens, width, call.epsilon});
  };
  Attention attends = call.attention;
  attends.qkv = between.qkv;
  attends.pages = layer.pages;
  attends.out = between.attended;
  const int64_t queries = query_width(attends);
  std::string wrong = norm(layer.input_norm, adds);
  if (wrong.empty()) wrong = multiply(call, layer.qkv, between.normed, width, between.qkv, qkv_width(attends));
  if (wrong.empty()) wrong = attention(attends);
  if (wrong.empty()) wrong = multiply(call, layer.o, between.attended, queries, between.delta, width);
  if (wrong.empty()) wrong = norm(layer.post_norm, true);
  if (wrong.empty()) {
    wrong = multiply(call, layer.gate_up, between.normed, width, between.mlp, call.mlp_width, call.gate);
  }
  if (wrong.empty()) wrong = multiply(call, layer.down, between.mlp, call.mlp_width, between.delta, width);
  return wrong;
}

}  // namespace

std::string decode_layers(const DecoderLayers& call) {
  if (call.width < 1 || call.mlp_width < 1 || !is_gated(call.gate)) return "a decoder's layers have widths and a gate";
  const int64_t size = call.attention.num_tokens * call.width;
  if (call.y != call.x) std::copy(call.x, call.x + size, call.y);
  const Between between = room_between(call);
  for (int64_t i = 0; i < call.num_layers; ++i) {
    std::string wrong = decode_layer(call, call.layers[i], i > 0, between);
    if (!wrong.empty()) return wrong;
  }
  if (call.num_layers > 0) {
    for (int64_t i = 0; i < size; ++i) call.y[i] += between.delta[i];
  }
  return "";
}

}  // namespace max_kernels
