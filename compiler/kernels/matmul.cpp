// Validates a packed matmul, and cuts it into pieces for the threads.
#include <algorithm>

#include "isa.h"
#include "scratch.h"
#include "thread_pool.h"

namespace max_kernels {
namespace {

// Rows that are multiplied with a panel in one go: few enough that they stay in the second-level cache.
constexpr int64_t kBlockRows = 96;
// Enough chunks per thread that one which loses its CPU for a while does not hold up the others.
constexpr int64_t kChunksPerThread = 6;
constexpr int64_t kMaxDimension = int64_t{1} << 31;

std::string problem(const Matmul& call) {
  for (int64_t size : {call.num_rows, call.num_inputs, call.num_outputs}) {
    if (size < 0 || size >= kMaxDimension) return "a dimension of the matmul is out of range";
  }
  const int64_t expected = packed_bytes(call.encoding, call.epilogue, call.num_inputs, call.num_outputs);
  if (call.weight_bytes != expected) {
    return "packed weights have " + std::to_string(call.weight_bytes) + " bytes, expected " + std::to_string(expected) +
           " for " + std::to_string(call.num_inputs) + " inputs and " + std::to_string(call.num_outputs) + " outputs";
  }
  if (call.encoding == Encoding::kQ8_0 && call.num_inputs % kQ8Inputs != 0) return "q8_0 needs a multiple of 32 inputs";
  if (kernels() == nullptr) return "MAX_KERNELS_ISA names an instruction set that this CPU lacks";
  return "";
}

// bfloat16 inputs, made once per call; rows are padded to pairs.
const void* converted_inputs(const Matmul& call, const Kernels& isa) {
  static thread_local Scratch scratch;
  const int64_t stride = call.num_inputs + call.num_inputs % 2;
  uint16_t* converted = static_cast<uint16_t*>(scratch.at_least(call.num_rows * stride * 2));
  const auto convert = [&](int64_t row) {
    isa.convert_inputs(call.x + row * call.num_inputs, call.num_inputs, converted + row * stride);
  };
  if (call.num_rows < 8) {  // less work than waking a thread
    for (int64_t row = 0; row < call.num_rows; ++row) convert(row);
  } else {
    parallel_for(call.num_rows, convert);
  }
  return converted;
}

}  // namespace

std::string matmul(const Matmul& call) {
  const std::string wrong = problem(call);
  if (!wrong.empty() || call.num_rows == 0 || call.num_outputs == 0) return wrong;
  const Kernels& isa = *kernels();
  const bool bf16 = call.encoding == Encoding::kBf16;
  const bool converts = bf16 && isa.convert_inputs != nullptr;
  const void* inputs = converts ? converted_inputs(call, isa) : call.x;
  const MatmulPanel panel_kernel = bf16                                ? isa.matmul_bf16
                                   : call.encoding == Encoding::kQ8_0 ? isa.matmul_q8
                                                                      : isa.matmul_f32;
  const int64_t width = call.epilogue == Epilogue::kSwiglu ? kHalfPanel : kPanelColumns;
  const int64_t num_panels = (call.num_outputs + width - 1) / width;
  const int64_t num_blocks = (call.num_rows + kBlockRows - 1) / kBlockRows;
  const int64_t wanted = std::max<int64_t>(1, num_threads() * kChunksPerThread / num_blocks);
  const int64_t panels_per_chunk = std::max<int64_t>(1, num_panels / wanted);
  const int64_t num_chunks = (num_panels + panels_per_chunk - 1) / panels_per_chunk;
  // Blocks of one group of panels follow each other: the panels are still in the cache.
  parallel_for(num_chunks * num_blocks, [&](int64_t i) {
    const int64_t begin = i % num_blocks * kBlockRows, end = std::min(begin + kBlockRows, call.num_rows);
    const int64_t first = i / num_blocks * panels_per_chunk;
    const int64_t last = std::min(first + panels_per_chunk, num_panels);
    for (int64_t panel = first; panel < last; ++panel) panel_kernel(call, inputs, panel, begin, end);
  });
  return "";
}

}  // namespace max_kernels
