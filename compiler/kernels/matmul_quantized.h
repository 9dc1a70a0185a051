// One panel of a matmul with quantized weights and inputs. Included as vector.h is; needs Dot (of products of bytes),
// load_f16(), and the sizes of tiles: kDotWideRows, kDotTallRows, kDotTallVectors and kRegisters.
//
// A block of 32 inputs (16 with q6_k) is summed in integers, exactly, and then added to the row's sum in float32. That
// is one order for every tile, so a row's bits do not depend on the tile that it falls into.

// Where a block of 32 inputs lies in a panel, its codes step by step, and its scales by column.
struct Q8Format {
  static constexpr int kLargest = 128, kGroups = 1;
  static constexpr bool kHasMinimum = false;
  static constexpr int64_t kBytes = kQ8Bytes;
  const uint8_t* at;
  MAX_INLINE Q8Format of(const uint8_t* panel, int64_t block) { return {panel + block * kQ8Bytes}; }
  MAX_MEMBER Bits codes(int64_t step, int64_t column) const {
    return load_bits(at + kScaleBytes + step * kStepBytes + column * kStepInputs);
  }
  MAX_MEMBER Vec scale(int, int64_t column) const { return load_f16(reinterpret_cast<const uint16_t*>(at) + column); }
  MAX_MEMBER Vec minimum(int64_t) const { return Vec{}; }
};

MAX_INLINE Bits load_nibbles(const uint8_t* codes, int64_t step, int64_t column) {
  const Bits both = load_bits(codes + step / 2 * kStepBytes + column * kStepInputs);
  return (step % 2 == 0 ? both : both >> 4) & 0x0f0f0f0f;
}

struct Q4Format {
  static constexpr int kLargest = 15, kGroups = 1;
  static constexpr bool kHasMinimum = false;
  static constexpr int64_t kBytes = kQ4Bytes;
  const uint8_t* at;
  MAX_INLINE Q4Format of(const uint8_t* panel, int64_t block) { return {panel + block * kQ4Bytes}; }
  MAX_MEMBER Bits codes(int64_t step, int64_t column) const { return load_nibbles(at + kScaleBytes, step, column); }
  MAX_MEMBER Vec scale(int, int64_t column) const { return load_f16(reinterpret_cast<const uint16_t*>(at) + column); }
  MAX_MEMBER Vec minimum(int64_t) const { return Vec{}; }
};

struct Q4KFormat {
  static constexpr int kLargest = 15, kGroups = 1;
  static constexpr bool kHasMinimum = true;
  static constexpr int64_t kBytes = kQ4KBytes / kSuperBlocks;
  const uint8_t* header;
  int64_t block;  // of the 8 behind it
  MAX_INLINE Q4KFormat of(const uint8_t* panel, int64_t block) {
    return {panel + block / kSuperBlocks * kQ4KBytes, block % kSuperBlocks};
  }
  MAX_MEMBER Bits codes(int64_t step, int64_t column) const {
    return load_nibbles(header + kQ4KHeaderBytes + block * kNibbleBytes, step, column);
  }
  MAX_MEMBER const uint8_t* scales() const { return header + 2 * kScaleBytes; }
  MAX_MEMBER Vec scale(int, int64_t column) const {
    const Bits scale = widen_bytes(scales() + block * kPanelColumns + column) & 63;
    return load_f16(reinterpret_cast<const uint16_t*>(header) + column) * __builtin_convertvector(scale, Vec);
  }
  MAX_MEMBER Vec minimum(int64_t column) const {
    const Bits upper = widen_bytes(scales() + block * kPanelColumns + column) >> 6;
    const Bits lower = widen_bytes(scales() + (kSuperBlocks + block / 2) * kPanelColumns + column);
    const Bits minimum = (upper << 4) | (lower >> static_cast<int>(block % 2 * 4) & 15);
    return load_f16(reinterpret_cast<const uint16_t*>(header + kScaleBytes) + column) *
           __builtin_convertvector(minimum, Vec);
  }
};

struct Q6KFormat {
  static constexpr int kLargest = 63, kGroups = 2;
  static constexpr bool kHasMinimum = false;
  static constexpr int64_t kBytes = kQ6KBytes / kSuperBlocks;
  const uint8_t* header;
  int64_t block;
  MAX_INLINE Q6KFormat of(const uint8_t* panel, int64_t block) {
    return {panel + block / kSuperBlocks * kQ6KBytes, block % kSuperBlocks};
  }
  MAX_MEMBER Bits codes(int64_t step, int64_t column) const {
    const uint8_t* at = header + kQ6KHeaderBytes + block * kQ6KBlockBytes;
    const Bits upper = load_bits(at + kNibbleBytes + step / 4 * kStepBytes + column * kStepInputs);
    const Bits placed = step % 4 == 0 ? upper << 4 : step % 4 == 1 ? upper << 2 : step % 4 == 2 ? upper : upper >> 2;
    return load_nibbles(at, step, column) | (placed & 0x30303030);
  }
  MAX_MEMBER Vec scale(int group, int64_t column) const {
    const uint8_t* scales = header + kScaleBytes + (2 * block + group) * kPanelColumns;
    const Vec scale = __builtin_convertvector(widen_signed_bytes(scales + column), Vec);
    return load_f16(reinterpret_cast<const uint16_t*>(header) + column) * scale;
  }
  MAX_MEMBER Vec minimum(int64_t) const { return Vec{}; }
};

// A block of another format with its codes as bytes and its scales as floats: what many rows are multiplied with.
template <class Format>
struct Unpacked {
  static constexpr int kLargest = Format::kLargest, kGroups = Format::kGroups;
  static constexpr bool kHasMinimum = Format::kHasMinimum;
  static constexpr int64_t kScales = (kGroups + kHasMinimum) * kPanelColumns;
  static constexpr int64_t kBytes = kScales * 4 + kBlockInputs * kPanelColumns;
  uint8_t* at;
  MAX_INLINE Unpacked of(const uint8_t* memory, int64_t block) {
    return {const_cast<uint8_t*>(memory) + block * kBytes};
  }
  MAX_MEMBER float* scales() const { return reinterpret_cast<float*>(at); }
  MAX_MEMBER Bits codes(int64_t step, int64_t column) const {
    return load_bits(at + kScales * 4 + step * kStepBytes + column * kStepInputs);
  }
  MAX_MEMBER Vec scale(int group, int64_t column) const { return load(scales() + group * kPanelColumns + column); }
  MAX_MEMBER Vec minimum(int64_t column) const { return load(scales() + kGroups * kPanelColumns + column); }

  MAX_MEMBER void fill(const Format& block) const {
    for (int64_t column = 0; column < kPanelColumns; column += kLanes) {
      for (int group = 0; group < kGroups; ++group)
        store(scales() + group * kPanelColumns + column, block.scale(group, column));
      if (kHasMinimum) store(scales() + kGroups * kPanelColumns + column, block.minimum(column));
#pragma GCC unroll 8
      for (int64_t step = 0; step < kBlockSteps; ++step)
        store_bits(at + kScales * 4 + step * kStepBytes + column * kStepInputs, block.codes(step, column));
    }
  }
};

struct QuantizedTile {
  const uint8_t* weights;         // of the first block
  const QuantizedInputs* inputs;  // of the first row and block
  int64_t inputs_stride;          // from block to block
  float* y;                       // rows of kPanelColumns
  int64_t num_blocks;
  int64_t first_column;
  bool add;  // to what is in y
};

// One hint per cache line, spread over the steps of a block: in a burst they would hold up the loads.
template <int64_t Bytes>
MAX_INLINE void prefetch_block(const uint8_t* block, int64_t step) {
  constexpr int64_t kLines = (Bytes + 63) / 64;
#pragma GCC unroll 4
  for (int64_t line = step * kLines / kBlockSteps; line < (step + 1) * kLines / kBlockSteps; ++line)
    __builtin_prefetch(block + kPrefetch + line * 64);
}

template <class Format, int Rows, int Vectors, bool Prefetch>
static void multiply_quantized(const QuantizedTile& t) {
  using Products = Dot<Format::kLargest>;
  constexpr bool kKeeps = 2 * Rows * Vectors + Vectors + 1 < kRegisters;  // the sums in registers, or else in y
  constexpr int kSteps = static_cast<int>(kBlockSteps) / Format::kGroups;
  constexpr int kTogether = kSteps < Products::kSteps ? kSteps : Products::kSteps;
  Vec kept[kKeeps ? Rows : 1][Vectors];
  if (kKeeps || !t.add) {
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 16
      for (int v = 0; v < Vectors; ++v) {
        float* y = t.y + r * kPanelColumns + t.first_column + v * kLanes;
        if (kKeeps) {
          kept[kKeeps ? r : 0][v] = t.add ? load(y) : Vec{};
        } else {
          store(y, Vec{});
        }
      }
    }
  }
  const QuantizedInputs* x = t.inputs;
  for (int64_t b = 0; b < t.num_blocks; ++b, x += t.inputs_stride) {
    const Format block = Format::of(t.weights, b);
#pragma GCC unroll 2
    for (int group = 0; group < Format::kGroups; ++group) {
      Bits total[Rows][Vectors];
      typename Products::Sum sum[Rows][Vectors];
#pragma GCC unroll 16
      for (int r = 0; r < Rows; ++r) {
        const Bits start = broadcast_bits(x[r].start[group]);
#pragma GCC unroll 16
        for (int v = 0; v < Vectors; ++v) total[r][v] = start;
      }
#pragma GCC unroll 8
      for (int step = 0; step < kSteps; ++step) {
        const int place = group * kSteps + step;
        typename Products::Weights weights[Vectors];
#pragma GCC unroll 16
        for (int v = 0; v < Vectors; ++v)
          weights[v] = Products::weights(block.codes(place, t.first_column + v * kLanes));
        if (Prefetch) prefetch_block<Format::kBytes>(t.weights + b * Format::kBytes, place);
#pragma GCC unroll 16
        for (int r = 0; r < Rows; ++r) {
          int32_t four;
          __builtin_memcpy(&four, x[r].values + place * kStepInputs, sizeof four);
          const typename Products::Inputs inputs = Products::inputs(broadcast_bits(four));
#pragma GCC unroll 16
          for (int v = 0; v < Vectors; ++v) {
            if (step % kTogether == 0) sum[r][v] = Products::begin(total[r][v]);
            sum[r][v] = Products::add(sum[r][v], weights[v], inputs);
            if (step % kTogether == kTogether - 1) total[r][v] = Products::end(total[r][v], sum[r][v]);
          }
        }
      }
      Vec scale[Vectors], minimum[Vectors];
#pragma GCC unroll 16
      for (int v = 0; v < Vectors; ++v) {
        scale[v] = block.scale(group, t.first_column + v * kLanes);
        if (Format::kHasMinimum) minimum[v] = block.minimum(t.first_column + v * kLanes);
      }
#pragma GCC unroll 16
      for (int r = 0; r < Rows; ++r) {
        const Vec input_scale = broadcast(x[r].scale), minus_sum = broadcast(x[r].minus_sum);
#pragma GCC unroll 16
        for (int v = 0; v < Vectors; ++v) {
          float* y = t.y + r * kPanelColumns + t.first_column + v * kLanes;
          Vec value = kKeeps ? kept[kKeeps ? r : 0][v] : load(y);
          value = multiply_add(__builtin_convertvector(total[r][v], Vec), scale[v] * input_scale, value);
          if (Format::kHasMinimum) value = multiply_add(minimum[v], minus_sum, value);
          if (kKeeps) {
            kept[kKeeps ? r : 0][v] = value;
          } else {
            store(y, value);
          }
        }
      }
    }
  }
  if (kKeeps) {
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 16
      for (int v = 0; v < Vectors; ++v) store(t.y + r * kPanelColumns + t.first_column + v * kLanes, kept[kKeeps ? r : 0][v]);
    }
  }
}

// The tiles of 1 to N rows, as a table indexed by the number of rows less one.
template <class Format, int Vectors, bool Prefetch, class Rows>
struct QuantizedTiles;
template <class Format, int Vectors, bool Prefetch, int... R>
struct QuantizedTiles<Format, Vectors, Prefetch, Indices<R...>> {
  static constexpr void (*table[])(const QuantizedTile&) = {multiply_quantized<Format, R + 1, Vectors, Prefetch>...};
};

// Few rows, straight from the panel, which is read once.
template <class Format>
MAX_INLINE void multiply_few_rows(const uint8_t* panel, const QuantizedInputs* x, int64_t rows, int64_t num_blocks,
                                  float* y) {
  using Tiles = QuantizedTiles<Format, kPanelVectors, true, typename MakeIndices<kDotWideRows>::type>;
  Tiles::table[rows - 1]({panel, x, rows, y, num_blocks, 0, false});
}

// Many rows: some blocks of the panel at a time are unpacked into the first-level cache, and all rows multiplied with
// them.
template <class Format>
static void multiply_many_rows(const uint8_t* panel, const QuantizedInputs* x, int64_t rows, int64_t num_blocks,
                               float* y) {
  using Blocks = Unpacked<Format>;
  using Tiles = QuantizedTiles<Blocks, kDotTallVectors, false, typename MakeIndices<kDotTallRows>::type>;
  alignas(64) uint8_t unpacked[kUnpackedBlocks * Blocks::kBytes];
  for (int64_t first = 0; first < num_blocks; first += kUnpackedBlocks) {
    const int64_t count = num_blocks - first < kUnpackedBlocks ? num_blocks - first : kUnpackedBlocks;
    for (int64_t b = 0; b < count; ++b) Blocks::of(unpacked, b).fill(Format::of(panel, first + b));
    for (int64_t row = 0; row < rows;) {
      const int64_t tile_rows = rows_of_tile(rows - row, kDotTallRows);
      QuantizedTile t{unpacked, x + first * rows + row, rows, y + row * kPanelColumns, count, 0, first > 0};
      for (; t.first_column < kPanelColumns; t.first_column += kDotTallVectors * kLanes) Tiles::table[tile_rows - 1](t);
      row += tile_rows;
    }
  }
}

template <class Format>
static void matmul_panel_quantized(const Matmul& call, const void* inputs, int64_t panel, int64_t begin, int64_t end) {
  alignas(64) float y[kQuantizedBlockRows * kPanelColumns];
  const int64_t num_blocks = call.num_inputs / kBlockInputs, rows = end - begin;
  const uint8_t* weights = call.weights + panel * num_blocks * Format::kBytes;
  const QuantizedInputs* x = static_cast<const QuantizedInputs*>(inputs);
  if (rows <= kDotWideRows) {
    multiply_few_rows<Format>(weights, x, rows, num_blocks, y);
  } else {
    multiply_many_rows<Format>(weights, x, rows, num_blocks, y);
  }
  for (int64_t r = 0; r < rows; ++r) finish_row(call, y + r * kPanelColumns, panel, begin + r);
}
