// bfloat16 weights with inputs that are rounded to bfloat16, for AVX-512 with products of pairs. Included as vector.h is.

// Adds the products of a pair of inputs of each row.
template <int Rows, int Vectors>
MAX_INLINE void accumulate_pairs(const InputRows<Rows>& x, const __m512bh (&w)[Vectors], Vec (&sum)[Rows][Vectors]) {
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r) {
    int32_t pair;
    __builtin_memcpy(&pair, x.row(r), sizeof pair);
    const __m512bh input = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 16
    for (int v = 0; v < Vectors; ++v) sum[r][v] = _mm512_dpbf16_ps(sum[r][v], w[v], input);
  }
}

// x is in pairs of bfloat16, each as wide as a float: strides and inputs of the tile count pairs.
template <int Rows, int Vectors>
static void multiply_pairs(const TileShape& t, const uint16_t* w, int64_t w_stride) {
  Vec sum[Rows][Vectors];
  start(t, sum);
  InputRows<Rows> x(t);
  for (int64_t k = 0; k < t.num_inputs; ++k, w += w_stride, x.advance(1)) {
    __m512bh weights[Vectors];
    for (int v = 0; v < Vectors; ++v) weights[v] = (__m512bh)_mm512_loadu_si512(w + v * 2 * kLanes);
    hint_ahead<Vectors>(t, w);
    accumulate_pairs(x, weights, sum);
  }
  finish(t, sum);
}

template <int Vectors, class Rows>
struct PairTiles;
template <int Vectors, int... R>
struct PairTiles<Vectors, Indices<R...>> {
  static constexpr Multiply<uint16_t> table[] = {multiply_pairs<R + 1, Vectors>...};
};

struct PairsPanel {
  using Weight = uint16_t;
  static constexpr int64_t kElements = 2;
  static constexpr int64_t kWide = kWideRows, kTall = kTallRows;
  static Multiply<uint16_t> wide(int64_t rows) {
    return PairTiles<kPanelVectors, MakeIndices<kWideRows>::type>::table[rows - 1];
  }
  static Multiply<uint16_t> tall(int64_t rows) {
    return PairTiles<kTallVectors, MakeIndices<kTallRows>::type>::table[rows - 1];
  }
};

static void matmul_panel_bf16(const Matmul& call, const MatmulInputs& inputs, int64_t panel, int64_t begin,
                              int64_t end) {
  const int64_t pairs = (call.num_inputs + 1) / 2;
  multiply_panel<PairsPanel>(call, inputs, pairs, panel, begin, end);
}

static void convert_inputs(const float* x, int64_t count, uint16_t* converted) {
  const int64_t padded = count + count % 2;
  for (int64_t k = 0; k < padded; k += 16) {
    const int64_t left = count - k, left_padded = padded - k;
    const __mmask16 given = left >= 16 ? 0xffff : (__mmask16)((1u << left) - 1);
    const __mmask16 wanted = left_padded >= 16 ? 0xffff : (__mmask16)((1u << left_padded) - 1);
    const __m256bh rounded = _mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(given, x + k));
    _mm256_mask_storeu_epi16(converted + k, wanted, (__m256i)rounded);
  }
}
