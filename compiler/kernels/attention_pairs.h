// Attention over pages of bfloat16 in products of pairs, for AVX-512 that has them. Included as vector.h is.
//
// Queries, and the weights of values, are rounded to bfloat16, as their products in bfloat16 elsewhere round them; sums,
// scores and the softmax stay in float32. Weights are summed up as they are rounded: a result is a mean of the values.

// Two rows as one of pairs, (first, second) of each column: 32 columns in two vectors, or 16 in one.
MAX_INLINE __m512i interleave(__m512i first, __m512i second, int64_t from) {
  constexpr uint32_t kSecond = 32u << 16;  // words of `second` count on from those of `first`
  const __m512i column = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i word = _mm512_add_epi32(column, _mm512_set1_epi32(static_cast<int32_t>(from)));
  const __m512i both = _mm512_or_si512(word, _mm512_slli_epi32(word, 16));
  return _mm512_permutex2var_epi16(first, _mm512_add_epi32(both, _mm512_set1_epi32(kSecond)), second);
}

MAX_INLINE __m512i load_half(const uint16_t* p) {
  return _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

template <int Vectors>
MAX_INLINE void interleave_rows(const uint16_t* first, const uint16_t* second, __m512bh (&pairs)[Vectors]) {
  static_assert(Vectors == 1 || Vectors % 2 == 0, "pairs of rows come in one vector, or two at a time");
  if constexpr (Vectors == 1) {
    pairs[0] = (__m512bh)interleave(load_half(first), load_half(second), 0);
  } else {
#pragma GCC unroll 16
    for (int v = 0; v < Vectors; v += 2) {
      const __m512i a = _mm512_loadu_si512(first + v * kLanes), b = _mm512_loadu_si512(second + v * kLanes);
      pairs[v] = (__m512bh)interleave(a, b, 0);
      pairs[v + 1] = (__m512bh)interleave(a, b, kLanes);
    }
  }
}

// Rows of pairs that interleave_rows() has made.
struct LaidPairs {
  using Type = uint32_t;
  template <int Vectors>
  MAX_INLINE void at(const uint32_t* p, int64_t, bool, __m512bh (&pairs)[Vectors]) {
#pragma GCC unroll 16
    for (int v = 0; v < Vectors; ++v) pairs[v] = (__m512bh)_mm512_loadu_si512(p + v * kLanes);
  }
  static constexpr int64_t kRowsOfPair = 1;
};

// Rows of a page, of which each two become pairs; zeros stand for the partner of a last, odd one.
struct PairedElements {
  using Type = uint16_t;
  using Laid = LaidPairs;
  template <int Vectors>
  MAX_INLINE void at(const uint16_t* p, int64_t stride, bool is_single, __m512bh (&pairs)[Vectors]) {
    alignas(64) static constexpr uint16_t kZeros[Vectors * kLanes] = {};
    interleave_rows(p, is_single ? kZeros : p + stride, pairs);
  }
  static constexpr int64_t kRowsOfPair = 2;

  MAX_INLINE bool fits(const RowsOfPage& rows) { return rows.width % kLanes == 0; }

  // Pairs of rows, `laid_stride` pairs apart with zeros behind each.
  static void lay(const uint16_t* in, const RowsOfPage& rows, int64_t laid_stride, uint32_t* laid) {
    constexpr int64_t kColumns = 2 * kLanes;
    for (int64_t n = 0; n < rows.count; n += 2, in += 2 * rows.stride, laid += laid_stride) {
      const bool single = n + 1 == rows.count;
      prefetch_ahead(in, rows.width * 2);
      if (!single) prefetch_ahead(in + rows.stride, rows.width * 2);
      for (int64_t i = 0; i < laid_stride; i += kColumns) {
        const int64_t left = rows.width - i;
        const __mmask32 given = left >= kColumns ? 0xffffffffu : left > 0 ? (1u << left) - 1 : 0u;
        const __m512i first = _mm512_maskz_loadu_epi16(given, in + i);
        const __m512i second = _mm512_maskz_loadu_epi16(single ? 0u : given, in + rows.stride + i);
        _mm512_storeu_si512(laid + i, interleave(first, second, 0));
        if (i + kLanes < laid_stride) _mm512_storeu_si512(laid + i + kLanes, interleave(first, second, kLanes));
      }
    }
  }

  // In place: what is rounded takes the first half of its row.
  MAX_INLINE void round_query(float* query, int64_t count) {
    convert_inputs(query, count, reinterpret_cast<uint16_t*>(query));
  }

  // As weights of float32 are made, but rounded, one after the other from `scores` on, and summed up two at a time.
  MAX_INLINE Vec weigh(float* scores, float peak, const KeysSeen& seen, Vec total) {
    const __m512bh ones = (__m512bh)_mm512_set1_epi16(0x3f80);
    for (int64_t k = 0; k < seen.count; k += 2 * kLanes) {
      const Vec first = weights_at(scores, k, peak, seen);
      const Vec second = k + kLanes < seen.count ? weights_at(scores, k + kLanes, peak, seen) : Vec{};
      const __m512bh rounded = _mm512_cvtne2ps_pbh(second, first);
      total = _mm512_dpbf16_ps(total, rounded, ones);
      _mm512_storeu_si512(scores + k / 2, (__m512i)rounded);
    }
    return total;
  }
};

// Products with pairs of rows; the tile's inputs are counted one by one, and its strides in pairs.
template <class Elements, int Rows, int Vectors, bool Prefetch>
static void multiply_row_pairs(const TileShape& t, const typename Elements::Type* w, int64_t w_stride) {
  Vec sum[Rows][Vectors];
  start(t, sum);
  InputRows<Rows> x(t);
  for (int64_t k = 0; k < t.num_inputs; k += 2, w += Elements::kRowsOfPair * w_stride, x.advance(1)) {
    __m512bh columns[Vectors];
    Elements::at(w, w_stride, k + 1 == t.num_inputs, columns);
    for (int64_t row = 0; Prefetch && row < Elements::kRowsOfPair; ++row)
      prefetch_ahead(w + row * w_stride, Vectors * kLanes * static_cast<int64_t>(sizeof *w));
    accumulate_pairs(x, columns, sum);
  }
  finish(t, sum);
}

template <int Vectors, int... R>
struct AttendTiles<LaidPairs, Vectors, Indices<R...>> {
  static constexpr Multiply<uint32_t> cached[] = {multiply_row_pairs<LaidPairs, R + 1, Vectors, false>...};
  static constexpr const auto& streamed = cached;  // they have been read when they were laid
};
template <int Vectors, int... R>
struct AttendTiles<PairedElements, Vectors, Indices<R...>> {
  static constexpr Multiply<uint16_t> cached[] = {multiply_row_pairs<PairedElements, R + 1, Vectors, false>...};
  static constexpr Multiply<uint16_t> streamed[] = {multiply_row_pairs<PairedElements, R + 1, Vectors, true>...};
};

using HalfElements = PairedElements;  // those of pages of bfloat16
