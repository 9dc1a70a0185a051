// One panel of a packed matmul, row tile after row tile. Included as vector.h is; needs kWideRows, kTallRows and
// kTallVectors: up to kWideRows rows take the whole panel at once, more go kTallVectors vectors at a time. Pairs of
// bfloat16 take twice the registers for weights, and so have limits of their own, kWidePairRows and kTallPairRows.

constexpr int kPanelVectors = kPanelColumns / kLanes;
using WideTiles = Tiles<kPanelVectors, typename MakeIndices<kWideRows>::type>;
using TallTiles = Tiles<kTallVectors, typename MakeIndices<kTallRows>::type>;

// Splits what is left evenly where it fits two tiles: tiles of few rows are bound by the weights' bandwidth.
MAX_INLINE int64_t rows_of_tile(int64_t left, int64_t most) {
  if (left <= most) return left;
  return left < 2 * most ? (left + 1) / 2 : most;
}

MAX_INLINE void finish_row(const Matmul& call, const float* panel_row, int64_t panel, int64_t row) {
  const int64_t width = is_gated(call.epilogue) ? kHalfPanel : kPanelColumns;
  const int64_t first = panel * width;
  const int64_t count = call.num_outputs - first < width ? call.num_outputs - first : width;
  float* y = call.y + row * call.num_outputs + first;
  float part[kPanelColumns];  // of a panel with missing outputs
  float* result = count == width ? y : part;
  for (int64_t c = 0; c < width; c += kLanes) {
    Vec value = load(panel_row + c);
    if (is_gated(call.epilogue)) {
      value = activated(call.epilogue, value) * load(panel_row + kHalfPanel + c);
    } else if (call.epilogue == Epilogue::kBias && c + kLanes <= count) {
      value = value + load(call.bias + first + c);
    }
    store(result + c, value);
  }
  if (call.epilogue == Epilogue::kBias) {
    for (int64_t c = count - count % kLanes; c < count; ++c) result[c] = panel_row[c] + call.bias[first + c];
  }
  if (result == part) __builtin_memcpy(y, part, count * sizeof(float));
}

// A row's place in the result lies lines apart from the next one's: asked for early, they come together.
MAX_INLINE void prefetch_result(const Matmul& call, int64_t panel, int64_t row) {
  const int64_t width = is_gated(call.epilogue) ? kHalfPanel : kPanelColumns;
  const float* y = call.y + row * call.num_outputs + panel * width;
  for (int64_t at = 0; at < width; at += 16) __builtin_prefetch(y + at, 1);
}

// What a panel's weights are multiplied with, for each encoding.
struct F32Panel {
  using Weight = float;
  static constexpr int64_t kElements = 1;  // per column and step of the inputs
  static constexpr int64_t kWide = kWideRows, kTall = kTallRows;
  static Multiply<float> wide(int64_t rows) { return WideTiles::f32[rows - 1]; }
  static Multiply<float> tall(int64_t rows) { return TallTiles::f32[rows - 1]; }
};
struct Bf16Panel {
  using Weight = uint16_t;
  static constexpr int64_t kElements = 2;
  static constexpr int64_t kWide = kWidePairRows, kTall = kTallPairRows;
  static Multiply<uint16_t> wide(int64_t rows) { return WideTiles::bf16[rows - 1]; }
  static Multiply<uint16_t> tall(int64_t rows) { return TallTiles::bf16[rows - 1]; }
};

// `num_inputs` counts floats: of x, or of pairs of converted inputs.
template <class Panel>
MAX_INLINE void multiply_panel(const Matmul& call, const MatmulInputs& inputs, int64_t num_inputs, int64_t panel,
                               int64_t row_begin, int64_t row_end) {
  using Weight = typename Panel::Weight;
  constexpr int64_t kStride = kPanelColumns * Panel::kElements;
  const int64_t panel_size = (call.num_inputs + Panel::kElements - 1) / Panel::kElements * kStride;
  const float* x = static_cast<const float*>(inputs.rows);
  const Weight* w = reinterpret_cast<const Weight*>(call.weights) + panel * panel_size;
  // Whole panels without an epilogue are written where they belong, others go through room of their own.
  const int64_t first = panel * kPanelColumns;
  const bool direct = call.epilogue == Epilogue::kNone && call.num_outputs - first >= kPanelColumns;
  alignas(64) float room[(kWideRows > kTallRows ? kWideRows : kTallRows) * kPanelColumns];
  for (int64_t row = row_begin; row < row_end;) {
    const int64_t left = row_end - row;
    const bool wide = left <= Panel::kWide || Panel::kWide == Panel::kTall;
    const int64_t rows = rows_of_tile(left, wide ? Panel::kWide : Panel::kTall);
    for (int64_t r = 0; r < rows; ++r) prefetch_result(call, panel, row + r);
    float* y = direct ? call.y + row * call.num_outputs + first : room;
    const int64_t y_stride = direct ? call.num_outputs : kPanelColumns;
    TileShape t{x + row * inputs.stride, inputs.stride, y, y_stride, num_inputs, false, inputs.hints};
    if (wide) {
      Panel::wide(rows)(t, w, kStride);
    } else {
      for (int v = 0; v < kPanelVectors; v += kTallVectors) {
        t.y = y + v * kLanes;
        Panel::tall(rows)(t, w + v * kLanes * Panel::kElements, kStride);
      }
    }
    for (int64_t r = 0; r < rows && !direct; ++r) finish_row(call, room + r * kPanelColumns, panel, row + r);
    row += rows;
  }
}

static void matmul_panel_f32(const Matmul& call, const MatmulInputs& inputs, int64_t panel, int64_t begin,
                             int64_t end) {
  multiply_panel<F32Panel>(call, inputs, call.num_inputs, panel, begin, end);
}
