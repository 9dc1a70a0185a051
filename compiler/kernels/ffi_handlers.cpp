// The kernels as XLA custom calls. A name's version changes with its arguments: executables outlive libraries.
#include <algorithm>
#include <string>

#include "ffi_arguments.h"
#include "kernels.h"
#include "lazy_zeros.h"

using namespace max_kernels;

namespace {

// x (..., K) and y (..., N) with the same leading dimensions, packed weights (blocks, bytes of a block), and with epilogue 1 a bias (N,).
template <Encoding kEncoding>
ffi::Error matmul_handler(F32Buffer x, Bytes weights, ffi::RemainingArgs rest, ffi::Result<F32Buffer> y,
                          int64_t epilogue) {
  const auto x_dims = x.dimensions(), y_dims = y->dimensions();
  if (x_dims.size() == 0 || x_dims.size() != y_dims.size()) return reported("a matmul's x and y differ in rank");
  const int64_t inputs = x_dims.back(), outputs = y_dims.back();
  int64_t rows = 1;
  for (size_t i = 0; i + 1 < x_dims.size(); ++i) {
    if (x_dims[i] != y_dims[i]) return reported("a matmul's x and y differ in their rows");
    rows *= x_dims[i];
  }
  if (epilogue < 0 || epilogue >= kNumEpilogues) {
    return reported("a matmul's epilogue is 0, 1 (bias), 2 (swiglu), 3 or 4 (geglu by tanh or erf)");
  }
  // The last dimension says the encoding: blocks of equal size would otherwise be taken for each other.
  const auto blocks = weights.dimensions();
  if (blocks.size() != 2 || blocks.back() != bytes_per_element(kEncoding)) {
    return reported(std::string("packed weights are (blocks, ") + std::to_string(bytes_per_element(kEncoding)) +
                    ") bytes in " + name_of(kEncoding));
  }
  const bool wants_bias = epilogue == static_cast<int64_t>(Epilogue::kBias);
  if (rest.size() != (wants_bias ? 1 : 0)) return reported("a matmul has a bias where its epilogue adds one");
  const float* bias = nullptr;
  if (wants_bias) {
    const auto given = rest.get<ffi::Buffer<ffi::F32, 1>>(0);
    if (!given.has_value()) return given.error();
    if (static_cast<int64_t>(given->element_count()) != outputs) return reported("a bias has one element per output");
    bias = given->typed_data();
  }
  return reported(matmul({kEncoding, static_cast<Epilogue>(epilogue), x.typed_data(), weights.typed_data(), bias,
                          y->typed_data(), rows, inputs, outputs, static_cast<int64_t>(weights.element_count())}));
}

// ids (T,), packed weights as a matmul's, whose last dimension says the encoding, and y (T, K).
ffi::Error embed_handler(IndexVector ids, Bytes weights, ffi::Result<F32Matrix> y, int64_t outputs) {
  const auto blocks = weights.dimensions(), y_dims = y->dimensions();
  if (blocks.size() != 2 || y_dims[0] != ids.dimensions()[0]) return reported("an embedding has one row per id");
  for (int i = 0; i < kNumEncodings; ++i) {
    const Encoding encoding = static_cast<Encoding>(i);
    if (blocks.back() != bytes_per_element(encoding)) continue;
    return reported(embed({encoding, ids.typed_data(), weights.typed_data(), y->typed_data(), y_dims[0], y_dims[1],
                           outputs, static_cast<int64_t>(weights.element_count())}));
  }
  return reported("no packed weights have blocks of " + std::to_string(blocks.back()) + " bytes");
}

ffi::Error attention_handler(F32Matrix qkv, ffi::AnyBuffer pages, F32Matrix cos, F32Matrix sin, Table page_table,
                             IndexVector rows, IndexVector positions, IndexVector slots, ffi::RemainingArgs rest,
                             ffi::Result<F32Matrix> out, ffi::Result<ffi::AnyBuffer> new_pages, float scale,
                             float softcap, int64_t window) {
  Attention call{};
  const int64_t width = out->dimensions()[1];
  if (std::string wrong = describe({pages, cos, sin, page_table, rows, positions, slots}, &call); !wrong.empty()) {
    return reported(wrong);
  }
  if (pages.untyped_data() != new_pages->untyped_data()) return reported("pages are not updated in place");
  call.num_heads = call.head_dim > 0 ? width / call.head_dim : 0;
  const int64_t tokens = call.num_tokens, of_qkv = (call.num_heads + 2 * call.num_kv_heads) * call.head_dim;
  if (qkv.dimensions()[0] != tokens || qkv.dimensions()[1] != of_qkv || out->dimensions()[0] != tokens ||
      width != call.num_heads * call.head_dim) {
    return reported("the arguments of the attention do not fit each other");
  }
  call.qkv = qkv.typed_data();
  call.pages = new_pages->untyped_data();
  call.out = out->typed_data();
  call.scale = scale;
  call.softcap = softcap;
  call.window = window;
  if (rest.size() > 1) return reported("attention has at most one optional argument, the sinks");
  if (rest.size() == 1) {
    const auto sinks = rest.get<ffi::Buffer<ffi::F32, 1>>(0);
    if (!sinks.has_value()) return sinks.error();
    if (static_cast<int64_t>(sinks->element_count()) != call.num_heads) return reported("there is one sink per query head");
    call.sinks = sinks->typed_data();
  }
  return reported(attention(call));
}

bool is_alike(ffi::Span<const int64_t> a, ffi::Span<const int64_t> b) { return a[0] == b[0] && a[1] == b[1]; }

ffi::Error rms_norm_handler(F32Matrix x, F32Vector weight, ffi::Result<F32Matrix> y, float epsilon) {
  const auto dims = x.dimensions();
  if (!is_alike(dims, y->dimensions()) || weight.dimensions()[0] != dims[1]) {
    return reported("the arguments of the norm do not fit each other");
  }
  return reported(rms_norm({x.typed_data(), nullptr, weight.typed_data(), nullptr, y->typed_data(), dims[0], dims[1],
                            epsilon}));
}

ffi::Error add_rms_norm_handler(F32Matrix x, F32Matrix delta, F32Vector weight, ffi::Result<F32Matrix> sum,
                                ffi::Result<F32Matrix> y, float epsilon) {
  const auto dims = x.dimensions();
  if (!is_alike(dims, delta.dimensions()) || !is_alike(dims, sum->dimensions()) || !is_alike(dims, y->dimensions()) ||
      weight.dimensions()[0] != dims[1]) {
    return reported("the arguments of the norm do not fit each other");
  }
  return reported(rms_norm({x.typed_data(), delta.typed_data(), weight.typed_data(), sum->typed_data(),
                            y->typed_data(), dims[0], dims[1], epsilon}));
}

ffi::Error argmax_handler(F32Matrix x, ffi::Result<IndexVector> result) {
  const auto dims = x.dimensions();
  if (result->dimensions()[0] != dims[0]) return reported("argmax has one result per row");
  return reported(argmax(x.typed_data(), dims[0], dims[1], result->typed_data()));
}

// ids (B,) with B at least the rows; those beyond are 0.
ffi::Error sample_handler(F32Matrix logits, Table mask, Table history, F32Matrix bias, F32Matrix settings,
                          Table numbers, ffi::Result<IndexVector> ids) {
  const auto dims = logits.dimensions();
  const int64_t rows = dims[0], columns = dims[1], num_ids = ids->dimensions()[0];
  const bool fits = mask.dimensions()[0] == rows && mask.dimensions()[1] == (columns + 31) / 32 &&
                    history.dimensions()[1] == columns && bias.dimensions()[1] == columns &&
                    history.dimensions()[0] == bias.dimensions()[0] && settings.dimensions()[0] == rows &&
                    settings.dimensions()[1] * sizeof(float) == sizeof(SampleSettings) &&
                    numbers.dimensions()[0] == rows &&
                    numbers.dimensions()[1] * sizeof(int32_t) == sizeof(SampleNumbers) && num_ids >= rows;
  if (!fits) return reported("the arguments of the sampler do not fit each other");
  std::fill(ids->typed_data() + rows, ids->typed_data() + num_ids, 0);
  return reported(sample({logits.typed_data(), mask.typed_data(), history.typed_data(), bias.typed_data(),
                          reinterpret_cast<const SampleSettings*>(settings.typed_data()),
                          reinterpret_cast<const SampleNumbers*>(numbers.typed_data()), ids->typed_data(), rows,
                          columns, history.dimensions()[0]}));
}

// ids (B,) with B at least the rows of logits: those of the sampler, whose last ones may stand for no row.
ffi::Error logprobs_handler(F32Matrix logits, IndexVector ids, ffi::Result<ffi::Buffer<ffi::F32, 1>> chosen,
                            ffi::Result<Table> top_ids, ffi::Result<F32Matrix> top) {
  const auto dims = logits.dimensions(), top_dims = top->dimensions();
  const bool fits = ids.dimensions()[0] >= dims[0] && chosen->dimensions()[0] == dims[0] && top_dims[0] == dims[0] &&
                    top_ids->dimensions()[0] == dims[0] && top_ids->dimensions()[1] == top_dims[1];
  if (!fits) return reported("the arguments of the log probabilities do not fit each other");
  return reported(logprobs({logits.typed_data(), ids.typed_data(), chosen->typed_data(), top_ids->typed_data(),
                            top->typed_data(), dims[0], dims[1], top_dims[1]}));
}

ffi::Error lazy_zeros_handler(ffi::RemainingRets results) {
  for (size_t i = 0; i < results.size(); ++i) {
    const auto result = results.get<ffi::AnyBuffer>(i);
    if (!result.has_value()) return result.error();
    make_lazy_zeros((*result)->untyped_data(), static_cast<int64_t>((*result)->size_bytes()));
  }
  return ffi::Error::Success();
}

auto matmul_binding() {
  return ffi::Ffi::Bind().Arg<F32Buffer>().Arg<Bytes>().RemainingArgs().Ret<F32Buffer>().Attr<int64_t>("epilogue");
}

auto embed_binding() {
  return ffi::Ffi::Bind()
      .Arg<IndexVector>()  // ids (T,)
      .Arg<Bytes>()        // packed weights (blocks, bytes of a block)
      .Ret<F32Matrix>()    // (T, K)
      .Attr<int64_t>("outputs");
}

auto sample_binding() {
  return ffi::Ffi::Bind()
      .Arg<F32Matrix>()     // logits (R, V)
      .Arg<Table>()         // mask (R, ceil(V / 32))
      .Arg<Table>()         // history (A, V)
      .Arg<F32Matrix>()     // bias (A, V)
      .Arg<F32Matrix>()     // settings (R, 6), those of SampleSettings
      .Arg<Table>()         // numbers (R, 5), those of SampleNumbers
      .Ret<IndexVector>();  // (B,)
}

auto logprobs_binding() {
  return ffi::Ffi::Bind()
      .Arg<F32Matrix>()                    // logits (R, V)
      .Arg<IndexVector>()                  // ids (B,)
      .Ret<ffi::Buffer<ffi::F32, 1>>()     // of the ids (R,)
      .Ret<Table>()                        // ids of the highest (R, n)
      .Ret<F32Matrix>();                   // theirs (R, n)
}

auto rms_norm_binding() {
  return ffi::Ffi::Bind().Arg<F32Matrix>().Arg<F32Vector>().Ret<F32Matrix>().Attr<float>("epsilon");
}

auto add_rms_norm_binding() {
  return ffi::Ffi::Bind()
      .Arg<F32Matrix>()  // x (T, D), aliased to the first result
      .Arg<F32Matrix>()  // delta (T, D)
      .Arg<F32Vector>()  // weight (D,)
      .Ret<F32Matrix>()  // x + delta
      .Ret<F32Matrix>()  // its norm
      .Attr<float>("epsilon");
}

auto attention_binding() {
  return with_step(ffi::Ffi::Bind()
                       .Arg<F32Matrix>()        // qkv (T, (N + 2 K) H)
                       .Arg<ffi::AnyBuffer>())  // pages (P, 2, K, page_tokens, H), aliased to the second result
      .RemainingArgs()   // sinks (N,), or nothing
      .Ret<F32Matrix>()  // (T, N H)
      .Ret<ffi::AnyBuffer>()
      .Attr<float>("scale")
      .Attr<float>("softcap")
      .Attr<int64_t>("window");
}

}  // namespace

#pragma GCC visibility push(default)  // the library hides everything else
XLA_FFI_DEFINE_HANDLER_SYMBOL(max_matmul_f32_v2, matmul_handler<Encoding::kF32>, matmul_binding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(max_matmul_bf16_v2, matmul_handler<Encoding::kBf16>, matmul_binding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(max_matmul_q8_0_v2, matmul_handler<Encoding::kQ8_0>, matmul_binding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(max_matmul_q4_0_v1, matmul_handler<Encoding::kQ4_0>, matmul_binding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(max_matmul_q4_k_v1, matmul_handler<Encoding::kQ4K>, matmul_binding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(max_matmul_q6_k_v1, matmul_handler<Encoding::kQ6K>, matmul_binding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(max_embed_v1, embed_handler, embed_binding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(max_attention_v3, attention_handler, attention_binding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(max_rms_norm_v1, rms_norm_handler, rms_norm_binding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(max_add_rms_norm_v1, add_rms_norm_handler, add_rms_norm_binding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(max_argmax_v2, argmax_handler, ffi::Ffi::Bind().Arg<F32Matrix>().Ret<IndexVector>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(max_logprobs_v2, logprobs_handler, logprobs_binding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(max_sample_v2, sample_handler, sample_binding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(max_lazy_zeros_v1, lazy_zeros_handler, ffi::Ffi::Bind().RemainingRets());
#pragma GCC visibility pop
