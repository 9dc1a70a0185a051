// What Python calls through ctypes: packing, settings, and the kernels themselves for measurements and tests.
// Functions that can be refused return null, or a message that is valid until the thread's next call.
#include <string>

#include "isa.h"
#include "thread_pool.h"

using namespace max_kernels;

namespace {

const char* reported(std::string problem) {
  static thread_local std::string message;
  message = std::move(problem);
  return message.empty() ? nullptr : message.c_str();
}

}  // namespace

#pragma GCC visibility push(default)  // the library hides everything else
extern "C" {

// Changes with the packed layouts and with the arguments of these functions.
int32_t max_kernels_abi() { return 5; }

const char* max_kernels_isa() { return kernels() == nullptr ? nullptr : kernels()->name; }

int32_t max_kernels_supports(const char* name) { return isa_is_supported(name); }

const char* max_kernels_select(const char* name) { return reported(select_isa(name)); }

int32_t max_kernels_num_threads() { return num_threads(); }

void max_kernels_set_num_threads(int32_t threads) { set_num_threads(threads); }

int64_t max_kernels_packed_bytes(int32_t encoding, int32_t epilogue, int64_t num_inputs, int64_t num_outputs) {
  return packed_bytes(static_cast<Encoding>(encoding), static_cast<Epilogue>(epilogue), num_inputs, num_outputs);
}

const char* max_kernels_pack(const Packing* call) { return reported(pack(*call)); }

const char* max_kernels_quantize(int32_t encoding, const float* elements, int64_t num_elements, uint8_t* blocks) {
  return reported(quantize(static_cast<Encoding>(encoding), elements, num_elements, blocks));
}

const char* max_kernels_matmul(const Matmul* call) { return reported(matmul(*call)); }

const char* max_kernels_embed(const Embedding* call) { return reported(embed(*call)); }

const char* max_kernels_rms_norm(const RmsNorm* call) { return reported(rms_norm(*call)); }

const char* max_kernels_argmax(const float* x, int64_t num_rows, int64_t num_columns, int32_t* result) {
  return reported(argmax(x, num_rows, num_columns, result));
}

const char* max_kernels_logprobs(const Logprobs* call) { return reported(logprobs(*call)); }

const char* max_kernels_sample(const Sampling* call) { return reported(sample(*call)); }

uint32_t max_kernels_read(const void* memory, int64_t bytes) {
  return kernels() == nullptr ? 0 : kernels()->read(memory, bytes);
}

const char* max_kernels_attention(const Attention* call) { return reported(attention(*call)); }
}
#pragma GCC visibility pop
