// Validates a packed matmul, and cuts it into pieces for the threads.
#include <algorithm>
#include <cstring>

#include "isa.h"
#include "quantized_layout.h"
#include "scratch.h"
#include "thread_pool.h"

namespace max_kernels {
namespace {

// Rows that are multiplied with a panel in one go: few enough that they stay in the second-level cache, twice as many
// where they take half of it. For each block the panels come from beyond that cache again.
constexpr int64_t kFloatBlockRows = 96, kPairsBlockRows = 192;
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
  const int64_t block = block_size(call.encoding).inputs;
  if (is_quantized(call.encoding) && call.num_inputs % block != 0) {
    return std::string(name_of(call.encoding)) + " needs a multiple of " + std::to_string(block) + " inputs";
  }
  if (kernels() == nullptr) return "MAX_KERNELS_ISA names an instruction set that this CPU lacks";
  return "";
}

// Calls make(row) for all rows, several in a chunk: a row alone is less work than taking it.
template <class Make>
void make_rows(const Matmul& call, const Make& make) {
  constexpr int64_t kChunkRows = 4;
  parallel_for((call.num_rows + kChunkRows - 1) / kChunkRows, [&](int64_t i) {
    const int64_t end = std::min((i + 1) * kChunkRows, call.num_rows);
    for (int64_t row = i * kChunkRows; row < end; ++row) make(row);
  });
}

// From row to row an odd number of cache lines: those of a tile's rows that are read together then fall into different
// sets of the first cache. 12 rows of 1024 floats, side by side, fall into one, and push each other out.
int64_t spread_stride(int64_t floats) {
  constexpr int64_t kLine = 16;
  return (((floats + kLine - 1) / kLine) | 1) * kLine;
}

// bfloat16 inputs, made once per call; rows are padded to pairs.
MatmulInputs converted_inputs(const Matmul& call, const Kernels& isa, Hints hints) {
  static thread_local Scratch scratch;
  const int64_t stride = spread_stride((call.num_inputs + 1) / 2);
  uint16_t* converted = static_cast<uint16_t*>(scratch.at_least(call.num_rows * stride * 4));
  const auto convert = [&](int64_t row) {
    isa.convert_inputs(call.x + row * call.num_inputs, call.num_inputs, converted + row * stride * 2);
  };
  if (call.num_rows < 8) {  // less work than waking a thread
    for (int64_t row = 0; row < call.num_rows; ++row) convert(row);
  } else {
    make_rows(call, convert);
  }
  return {converted, stride, hints};
}

// float32 inputs: x itself, or a copy where many of its rows would fall into one set of the first cache.
MatmulInputs float_inputs(const Matmul& call, Hints hints) {
  constexpr int64_t kManyRows = 16, kOneSet = 512;  // floats: half of what a way of the cache holds
  if (call.num_rows < kManyRows || call.num_inputs % kOneSet != 0) return {call.x, call.num_inputs, hints};
  static thread_local Scratch scratch;
  const int64_t stride = spread_stride(call.num_inputs);
  float* spread = static_cast<float*>(scratch.at_least(call.num_rows * stride * static_cast<int64_t>(sizeof(float))));
  make_rows(call, [&](int64_t row) {
    std::memcpy(spread + row * stride, call.x + row * call.num_inputs, call.num_inputs * sizeof(float));
  });
  return {spread, stride, hints};
}

// int8 inputs, made once per call, as the panels take them. Rows of a tile share cache lines, so one thread makes them.
const QuantizedInputs* quantized_inputs(const Matmul& call, const Kernels& isa, int64_t block_rows) {
  static thread_local Scratch scratch;
  const int64_t num_blocks = call.num_inputs / kBlockInputs;
  const int64_t bytes = call.num_rows * num_blocks * static_cast<int64_t>(sizeof(QuantizedInputs));
  QuantizedInputs* quantized = static_cast<QuantizedInputs*>(scratch.at_least(bytes));
  constexpr int64_t kChunkRows = 8;  // less work is not worth waking a thread
  const int64_t most_rows = std::min(block_rows, call.num_rows);
  const int64_t tile_of_most = tile_rows(isa.quantized_tile_rows, most_rows);
  const int64_t chunk_rows =
      tile_of_most == most_rows ? kChunkRows : (kChunkRows + tile_of_most - 1) / tile_of_most * tile_of_most;
  const int64_t chunks_of_block = (most_rows + chunk_rows - 1) / chunk_rows;
  const int64_t blocks = (call.num_rows + block_rows - 1) / block_rows;
  parallel_for(blocks * chunks_of_block, [&](int64_t i) {
    const int64_t begin = i / chunks_of_block * block_rows, rows = std::min(block_rows, call.num_rows - begin);
    const int64_t tile = tile_rows(isa.quantized_tile_rows, rows);
    const int64_t first = i % chunks_of_block * chunk_rows, last = std::min(first + chunk_rows, rows);
    for (int64_t row = first; row < last; ++row) {
      const int64_t in_tile = row % tile, first_of_tile = begin + row - in_tile;
      isa.quantize_inputs(call.x + (begin + row) * call.num_inputs, num_blocks, call.encoding,
                          quantized + first_of_tile * num_blocks + in_tile,
                          std::min(tile, begin + rows - first_of_tile));
    }
  });
  return quantized;
}

MatmulPanel panel_kernel(const Kernels& isa, Encoding encoding) {
  if (encoding == Encoding::kF32) return isa.matmul_f32;
  if (encoding == Encoding::kBf16) return isa.matmul_bf16;
  return isa.matmul_quantized[static_cast<int>(encoding) - static_cast<int>(Encoding::kQ8_0)];
}

}  // namespace

std::string matmul(const Matmul& call) {
  const std::string wrong = problem(call);
  if (!wrong.empty() || call.num_rows == 0 || call.num_outputs == 0) return wrong;
  const Kernels& isa = *kernels();
  const bool quantized = is_quantized(call.encoding);
  const bool converts = call.encoding == Encoding::kBf16 && isa.convert_inputs != nullptr;
  const int64_t block_rows = quantized ? kQuantizedBlockRows : converts ? kPairsBlockRows : kFloatBlockRows;
  const Hints hints = hints_for(call.encoding, call.num_rows);
  const QuantizedInputs* blocks = quantized ? quantized_inputs(call, isa, block_rows) : nullptr;
  const MatmulInputs inputs = quantized  ? MatmulInputs{}
                              : converts ? converted_inputs(call, isa, hints)
                                         : float_inputs(call, hints);
  const MatmulPanel run_panel = panel_kernel(isa, call.encoding);
  const int64_t width = is_gated(call.epilogue) ? kHalfPanel : kPanelColumns;
  const int64_t num_panels = (call.num_outputs + width - 1) / width;
  const int64_t num_blocks = (call.num_rows + block_rows - 1) / block_rows;
  const int64_t wanted = std::max<int64_t>(1, num_threads() * kChunksPerThread / num_blocks);
  const int64_t panels_per_chunk = std::max<int64_t>(1, num_panels / wanted);
  const int64_t num_chunks = (num_panels + panels_per_chunk - 1) / panels_per_chunk;
  // Blocks of one group of panels follow each other: the panels are still in the cache.
  parallel_for(num_chunks * num_blocks, [&](int64_t i) {
    const int64_t begin = i % num_blocks * block_rows, end = std::min(begin + block_rows, call.num_rows);
    const MatmulInputs rows = quantized ? MatmulInputs{blocks + begin * (call.num_inputs / kBlockInputs), 0, hints} : inputs;
    const int64_t first = i / num_blocks * panels_per_chunk;
    const int64_t last = std::min(first + panels_per_chunk, num_panels);
    for (int64_t panel = first; panel < last; ++panel) run_panel(call, rows, panel, begin, end);
  });
  return "";
}

}  // namespace max_kernels
