// One panel of a matmul with quantized weights and inputs. Included as vector.h is; needs Dot (of products of bytes),
// and the sizes of tiles: kDotWideRows, kDotTallRows, kDotTallVectors and kRegisters.
//
// A block of 32 inputs (16 with q6_k) is summed in integers, exactly, and then added to the row's sum in float32. That
// is one order for every tile, so a row's bits do not depend on the tile that it falls into.

struct QuantizedTile {
  const uint8_t* weights;         // of the first block
  const QuantizedInputs* inputs;  // of the first row and block
  int64_t inputs_stride;          // from block to block
  float* y;                       // rows of kPanelColumns
  int64_t num_blocks;
  int64_t first_column;
  bool add;              // to what is in y
  const uint8_t* ahead;  // packed weights to hint at, as many as there are blocks in the tile; may be null
  Hints hints;
};

// One hint per cache line of the packed block. Few rows spread them over a block's steps: in a burst they would hold up
// the loads, which come from memory too.
template <int64_t Bytes>
MAX_INLINE void hint_at_block(Hints hints, const uint8_t* block, int64_t part, int64_t parts) {
  constexpr int64_t kLines = (Bytes + 63) / 64;
#pragma GCC unroll 20
  for (int64_t line = part * kLines / parts; line < (part + 1) * kLines / parts; ++line)
    hint(hints, block + line * 64);
}

// The sums of a tile: in registers where they fit beside the integer ones, or else in y.
template <int Rows, int Vectors>
struct TileSums {
  static constexpr bool kKeeps = 2 * Rows * Vectors + Vectors + 1 < kRegisters;
  Vec kept[kKeeps ? Rows : 1][Vectors];
  const QuantizedTile& t;

  MAX_MEMBER float* y(int r, int v) const { return t.y + r * kPanelColumns + t.first_column + v * kLanes; }
  MAX_MEMBER Vec get(int r, int v) const { return kKeeps ? kept[kKeeps ? r : 0][v] : load(y(r, v)); }
  MAX_MEMBER void set(int r, int v, Vec value) {
    if (kKeeps) {
      kept[kKeeps ? r : 0][v] = value;
    } else {
      store(y(r, v), value);
    }
  }
  MAX_MEMBER void begin() {
    if (!kKeeps && t.add) return;
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 16
      for (int v = 0; v < Vectors; ++v) set(r, v, t.add ? load(y(r, v)) : Vec{});
    }
  }
  MAX_MEMBER void end() const {
    if (!kKeeps) return;
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 16
      for (int v = 0; v < Vectors; ++v) store(y(r, v), kept[kKeeps ? r : 0][v]);
    }
  }
};

// The integer sums of a group of inputs, for rows x[0] to x[Rows - 1].
template <class Format, int Rows, int Vectors, bool Streams>
MAX_INLINE void sum_products(const Format& block, const QuantizedInputs* x, int group, int64_t first_column,
                             const uint8_t* ahead, Hints hints, Bits (&total)[Rows][Vectors]) {
  using Products = Dot<Format::kLargest>;
  constexpr int kSteps = static_cast<int>(kBlockSteps) / Format::kGroups;
  constexpr int kTogether = kSteps < Products::kSteps ? kSteps : Products::kSteps;
  typename Products::Sum sum[Rows][Vectors];
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 16
    for (int v = 0; v < Vectors; ++v) total[r][v] = broadcast_bits(x[r].start[group]);
  }
#pragma GCC unroll 8
  for (int step = 0; step < kSteps; ++step) {
    const int place = group * kSteps + step;
    typename Products::Weights weights[Vectors];
#pragma GCC unroll 16
    for (int v = 0; v < Vectors; ++v) weights[v] = Products::weights(block.codes(place, first_column + v * kLanes));
    if (Streams) hint_at_block<Format::kPackedBytes>(hints, ahead, place, kBlockSteps);
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
}

// Adds the integer sums of a group, in the units of their columns and rows, and behind the last group the minima.
template <class Format, int Rows, int Vectors>
MAX_INLINE void add_sums(const Format& block, const QuantizedInputs* x, int group, int64_t first_column,
                         const Bits (&total)[Rows][Vectors], TileSums<Rows, Vectors>& sums) {
  Vec scale[Vectors], minimum[Vectors];
#pragma GCC unroll 16
  for (int v = 0; v < Vectors; ++v) {
    scale[v] = block.scale(group, first_column + v * kLanes);
    if (Format::kHasMinimum) minimum[v] = block.minimum(first_column + v * kLanes);
  }
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r) {
    const Vec input_scale = broadcast(x[r].scale), minus_sum = broadcast(x[r].minus_sum);
#pragma GCC unroll 16
    for (int v = 0; v < Vectors; ++v) {
      const Vec products = __builtin_convertvector(total[r][v], Vec);
      Vec value = multiply_add(products, scale[v] * input_scale, sums.get(r, v));
      if (Format::kHasMinimum) value = multiply_add(minimum[v], minus_sum, value);
      sums.set(r, v, value);
    }
  }
}

// Streams: the weights come from memory, and hints for `ahead` are spread over the steps.
template <class Format, int Rows, int Vectors, bool Streams>
static void multiply_quantized(const QuantizedTile& t) {
  TileSums<Rows, Vectors> sums{{}, t};
  sums.begin();
  const QuantizedInputs* x = t.inputs;
  const uint8_t* ahead = t.ahead;
  for (int64_t b = 0; b < t.num_blocks; ++b, x += t.inputs_stride) {
    const Format block = Format::of(t.weights, b);
    if (!Streams && ahead != nullptr) hint_at_block<Format::kPackedBytes>(t.hints, ahead, 0, 1);
#pragma GCC unroll 2
    for (int group = 0; group < Format::kGroups; ++group) {
      Bits total[Rows][Vectors];
      sum_products<Format, Rows, Vectors, Streams>(block, x, group, t.first_column, ahead, t.hints, total);
      add_sums(block, x, group, t.first_column, total, sums);
    }
    if (Streams || ahead != nullptr) ahead += Format::kPackedBytes;
  }
  sums.end();
}

// The tiles of 1 to N rows, as a table indexed by the number of rows less one.
template <class Format, int Vectors, bool Streams, class Rows>
struct QuantizedTiles;
template <class Format, int Vectors, bool Streams, int... R>
struct QuantizedTiles<Format, Vectors, Streams, Indices<R...>> {
  static constexpr void (*table[])(const QuantizedTile&) = {multiply_quantized<Format, R + 1, Vectors, Streams>...};
};

// Few rows, straight from the panel, which is read once: up to kFewRows of a format, beyond which unpacking pays.
template <class Format>
MAX_INLINE void multiply_few_rows(const uint8_t* panel, const QuantizedInputs* x, int64_t rows, int64_t num_blocks,
                                  Hints hints, float* y) {
  constexpr int kRows = kDotWideRows < Format::kFewRows ? kDotWideRows : Format::kFewRows;
  using Tiles = QuantizedTiles<Format, kPanelVectors, true, typename MakeIndices<kRows>::type>;
  Tiles::table[rows - 1]({panel, x, rows, y, num_blocks, 0, false, panel + kHintBytes, hints});
}

// Many rows: some blocks of the panel at a time are unpacked into the first-level cache, and all rows multiplied with
// them. The first of them prefetch what is unpacked next.
template <class Format>
static void multiply_many_rows(const uint8_t* panel, const QuantizedInputs* x, int64_t rows, int64_t num_blocks,
                               float* y) {
  using Blocks = Unpacked<Format>;
  using Tiles = QuantizedTiles<Blocks, kDotTallVectors, false, typename MakeIndices<kDotTallRows>::type>;
  const int64_t tile = tile_rows({kDotWideRows, kDotTallRows}, rows);
  alignas(64) uint8_t unpacked[kUnpackedBlocks * Blocks::kBytes];
  for (int64_t first = 0; first < num_blocks; first += kUnpackedBlocks) {
    const int64_t count = num_blocks - first < kUnpackedBlocks ? num_blocks - first : kUnpackedBlocks;
    for (int64_t b = 0; b < count; ++b) Blocks::of(unpacked, b).fill(Format::of(panel, first + b));
    const uint8_t* ahead = panel + (first + count) * Format::kBytes;
    for (int64_t row = 0, height; row < rows; row += height) {
      const int64_t in_tile = row % tile, stride = rows - row + in_tile < tile ? rows - row + in_tile : tile;
      height = rows_of_tile(stride - in_tile, kDotTallRows);
      QuantizedTile t{unpacked, x + (row - in_tile) * num_blocks + first * stride + in_tile, stride,
                      y + row * kPanelColumns, count, 0, first > 0, row == 0 ? ahead : nullptr, Hints::kFirstCache};
      for (; t.first_column < kPanelColumns; t.first_column += kDotTallVectors * kLanes) Tiles::table[height - 1](t);
    }
  }
}

template <class Format>
static void matmul_panel_quantized(const Matmul& call, const MatmulInputs& inputs, int64_t panel, int64_t begin,
                                   int64_t end) {
  alignas(64) float y[kQuantizedBlockRows * kPanelColumns];
  const int64_t num_blocks = call.num_inputs / kBlockInputs, rows = end - begin;
  const uint8_t* weights = call.weights + panel * num_blocks * Format::kBytes;
  const QuantizedInputs* x = static_cast<const QuantizedInputs*>(inputs.rows);
  if (rows <= kDotWideRows && rows <= Format::kFewRows) {
    multiply_few_rows<Format>(weights, x, rows, num_blocks, inputs.hints, y);
  } else {
    multiply_many_rows<Format>(weights, x, rows, num_blocks, y);
  }
  constexpr int64_t kAhead = 16;
  for (int64_t r = 0; r < rows; ++r) {
    if (r + kAhead < rows) prefetch_result(call, panel, begin + r + kAhead);
    finish_row(call, y + r * kPanelColumns, panel, begin + r);
  }
}
