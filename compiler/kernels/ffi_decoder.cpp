// The layers of a decoder as an XLA custom call.
#include <vector>

#include "ffi_arguments.h"

using namespace max_kernels;

namespace {

using Numbers = ffi::Span<const int64_t>;

constexpr int64_t kMatrices = 4;             // of a layer: qkv, o, gate and up, down
constexpr int64_t kWeights = kMatrices + 2;  // and two norms: input norm, qkv, o, post norm, gate and up, down

// The weights of all layers as they lie in memory, and where each of them begins.
struct Weights {
  const uint8_t* begin;
  int64_t bytes;
  Numbers offsets;    // (L * kWeights,)
  Numbers encodings;  // (L * kMatrices,)
  bool fits = true;   // whether everything that was taken lies within

  const uint8_t* at(int64_t index, int64_t size) {
    const int64_t offset = offsets[index];
    fits = fits && offset >= 0 && offset % 64 == 0 && size >= 0 && offset <= bytes && size <= bytes - offset;
    return begin + offset;
  }
  const float* norm(int64_t index, int64_t width) {
    return reinterpret_cast<const float*>(at(index, width * static_cast<int64_t>(sizeof(float))));
  }
  Matrix matrix(int64_t index, int64_t number, Epilogue epilogue, int64_t inputs, int64_t outputs) {
    const int64_t encoding = encodings[number];
    fits = fits && encoding >= 0 && encoding < kNumEncodings;
    if (!fits) return {};
    const Encoding known = static_cast<Encoding>(encoding);
    const int64_t size = packed_bytes(known, epilogue, inputs, outputs);
    return {known, at(index, size), size};
  }
};

DecoderLayer layer_of(const DecoderLayers& call, Weights& weights, int64_t layer) {
  const int64_t first = layer * kWeights, matrix = layer * kMatrices, width = call.width;
  const int64_t queries = call.attention.num_heads * call.attention.head_dim;
  const int64_t qkv = queries + 2 * call.attention.num_kv_heads * call.attention.head_dim;
  DecoderLayer found{};
  found.input_norm = weights.norm(first, width);
  found.qkv = weights.matrix(first + 1, matrix, Epilogue::kNone, width, qkv);
  found.o = weights.matrix(first + 2, matrix + 1, Epilogue::kNone, queries, width);
  found.post_norm = weights.norm(first + 3, width);
  found.gate_up = weights.matrix(first + 4, matrix + 2, call.gate, width, call.mlp_width);
  found.down = weights.matrix(first + 5, matrix + 3, Epilogue::kNone, call.mlp_width, width);
  return found;
}

ffi::Error decoder_handler(F32Matrix x, Bytes weights, F32Matrix cos, F32Matrix sin, Table page_table, IndexVector rows,
                           IndexVector positions, IndexVector slots, ffi::RemainingArgs pages,
                           ffi::Result<F32Matrix> y, ffi::RemainingRets new_pages, Numbers offsets, Numbers encodings,
                           int64_t heads, int64_t mlp_width, int64_t gate, float scale, float epsilon) {
  const int64_t num_layers = static_cast<int64_t>(pages.size());
  DecoderLayers call{};
  call.width = x.dimensions()[1];
  call.mlp_width = mlp_width;
  call.epsilon = epsilon;
  const bool fits = num_layers > 0 && static_cast<int64_t>(new_pages.size()) == num_layers &&
                    static_cast<int64_t>(offsets.size()) == num_layers * kWeights &&
                    static_cast<int64_t>(encodings.size()) == num_layers * kMatrices &&
                    x.dimensions()[0] == rows.dimensions()[0] && y->dimensions()[0] == x.dimensions()[0] &&
                    y->dimensions()[1] == call.width && gate >= 0 && gate < kNumEpilogues && heads > 0;
  if (!fits) return reported("the arguments of the layers do not fit each other");
  call.gate = static_cast<Epilogue>(gate);
  std::vector<DecoderLayer> layers;
  Weights all{weights.typed_data(), static_cast<int64_t>(weights.element_count()), offsets, encodings};
  for (int64_t layer = 0; layer < num_layers; ++layer) {
    const auto own = pages.get<ffi::AnyBuffer>(layer);
    const auto written = new_pages.get<ffi::AnyBuffer>(layer);
    if (!own.has_value()) return own.error();
    if (!written.has_value()) return written.error();
    if (own->untyped_data() != (*written)->untyped_data()) return reported("pages are not updated in place");
    Attention described{};
    const std::string wrong = describe({*own, cos, sin, page_table, rows, positions, slots}, &described);
    if (!wrong.empty()) return reported(wrong);
    if (layer == 0) {
      call.attention = described;
      call.attention.num_heads = heads;
      call.attention.scale = scale;
    } else if (described.num_pages != call.attention.num_pages || described.page_tokens != call.attention.page_tokens ||
               described.num_kv_heads != call.attention.num_kv_heads ||
               described.head_dim != call.attention.head_dim ||
               described.pages_are_bf16 != call.attention.pages_are_bf16) {
      return reported("the pages of two layers differ");
    }
    layers.push_back(layer_of(call, all, layer));
    if (!all.fits) return reported("a layer's weights do not lie within those of all");
    layers.back().pages = (*written)->untyped_data();
  }
  call.layers = layers.data();
  call.num_layers = num_layers;
  call.x = x.typed_data();
  call.y = y->typed_data();
  return reported(decode_layers(call));
}

auto decoder_binding() {
  return with_step(ffi::Ffi::Bind()
                       .Arg<F32Matrix>()  // x (T, D)
                       .Arg<Bytes>())     // the weights of all layers
      .RemainingArgs()   // the pages of each layer (P, 2, K, page_tokens, H), aliased to the results
      .Ret<F32Matrix>()  // (T, D)
      .RemainingRets()
      .Attr<Numbers>("offsets")
      .Attr<Numbers>("encodings")
      .Attr<int64_t>("heads")
      .Attr<int64_t>("mlp_width")
      .Attr<int64_t>("gate")
      .Attr<float>("scale")
      .Attr<float>("epsilon");
}

}  // namespace

#pragma GCC visibility push(default)  // the library hides everything else
XLA_FFI_DEFINE_HANDLER_SYMBOL(max_decoder_layers_v1, decoder_handler, decoder_binding());
#pragma GCC visibility pop
