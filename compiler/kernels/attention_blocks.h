// Products of a tile's queries with the keys of a block, and of their weights with its values. Included as vector.h is;
// needs kAttendRows and kAttendVectors, the queries and vectors whose sums fit the registers.
//
// Both are small matmuls over pages as they lie, keys one per lane and values in rows; each sum takes one element, or
// value, after the other, whatever the number of queries.

// A row of elements is `width` long, and the next one lies `stride` elements behind it.
struct RowsOfPage {
  int64_t count, width, stride;
};

// The keys [begin, end) of a block that a query sees, of those up to `count` that take part.
struct KeysSeen {
  int64_t begin, end, count;
};

// All lanes from `first` to before `end`.
MAX_INLINE Bits lanes_between(int64_t first, int64_t end) {
  Bits lane{};
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  const int32_t low = static_cast<int32_t>(first < 0 ? 0 : first < kLanes ? first : kLanes);
  const int32_t high = static_cast<int32_t>(end < 0 ? 0 : end < kLanes ? end : kLanes);
  return (lane >= (Bits{} + low)) & (lane < (Bits{} + high));
}

// The weights of a vector of keys, from `k` on, against the highest score so far; 0 for keys that are not seen.
MAX_INLINE Vec weights_at(const float* scores, int64_t k, float peak, const KeysSeen& seen) {
  const Vec weights = exponential_below_one(load(scores + k) - peak);
  if (seen.begin <= k && k + kLanes <= seen.end) return weights;
  return lanes_between(seen.begin - k, seen.end - k) ? weights : Vec{};
}

// What attention does with elements of a page that it multiplies as float32.
template <class Element>
struct FloatProducts {
  using Type = Element;
  using Laid = FloatProducts<float>;
  MAX_INLINE Vec at(const Element* p) { return load_any(p); }

  // Whether products can take rows where they lie.
  MAX_INLINE bool fits(const RowsOfPage& rows) { return rows.width % kLanes == 0; }

  // Rows as float32, `laid_stride` floats apart with zeros behind each.
  static void lay(const Element* in, const RowsOfPage& rows, int64_t laid_stride, float* laid) {
    for (int64_t n = 0; n < rows.count; ++n, in += rows.stride, laid += laid_stride) {
      prefetch_ahead(in, rows.width * static_cast<int64_t>(sizeof *in));
      for (int64_t i = 0; i < laid_stride; i += kLanes) store(laid + i, load_part(in + i, rows.width - i));
    }
  }

  // A query stays as it is.
  MAX_INLINE void round_query(float*, int64_t) {}

  // Turns a query's scores into weights, which it adds to a total.
  MAX_INLINE Vec weigh(float* scores, float peak, const KeysSeen& seen, Vec total) {
    for (int64_t k = 0; k < seen.count; k += kLanes) {
      const Vec weights = weights_at(scores, k, peak, seen);
      total = total + weights;
      store(scores + k, weights);
    }
    return total;
  }
};
using FloatElements = FloatProducts<float>;
using WidenedElements = FloatProducts<uint16_t>;

template <class Elements, int Rows, int Vectors, bool Prefetch>
static void multiply_elements(const TileShape& t, const typename Elements::Type* w, int64_t w_stride) {
  Vec sum[Rows][Vectors];
  start(t, sum);
  InputRows<Rows> x(t);
  for (int64_t k = 0; k < t.num_inputs; ++k, w += w_stride, x.advance(1)) {
    Vec columns[Vectors];
#pragma GCC unroll 16
    for (int v = 0; v < Vectors; ++v) columns[v] = Elements::at(w + v * kLanes);
    if (Prefetch) prefetch_ahead(w, Vectors * kLanes * static_cast<int64_t>(sizeof *w));
    accumulate(x, 0, columns, sum);
  }
  finish(t, sum);
}

template <class Elements, int Vectors, class Rows>
struct AttendTiles;
template <class Elements, int Vectors, int... R>
struct AttendTiles<Elements, Vectors, Indices<R...>> {
  using Type = Multiply<typename Elements::Type>;
  static constexpr Type cached[] = {multiply_elements<Elements, R + 1, Vectors, false>...};
  static constexpr Type streamed[] = {multiply_elements<Elements, R + 1, Vectors, true>...};
};

// A few rows of a product, in as many columns as are asked for; elements that are read for the first time are streamed.
template <class Elements>
MAX_INLINE void multiply_rows(TileShape t, const typename Elements::Type* w, int64_t w_stride, int64_t rows,
                              int64_t columns, bool streamed) {
  using Rows = typename MakeIndices<kAttendRows>::type;
  using Wide = AttendTiles<Elements, kAttendVectors, Rows>;
  using Narrow = AttendTiles<Elements, 1, Rows>;
  constexpr int64_t kWide = kAttendVectors * kLanes;
  const auto wide = (streamed ? Wide::streamed : Wide::cached)[rows - 1];
  const auto narrow = (streamed ? Narrow::streamed : Narrow::cached)[rows - 1];
  int64_t i = 0;
  for (; i + kWide <= columns; i += kWide, t.y += kWide) wide(t, w + i, w_stride);
  for (; i < columns; i += kLanes, t.y += kLanes) narrow(t, w + i, w_stride);
}

// Calls use(elements, rows, stride, in place) with rows of whole vectors. Few queries read elements where they lie; for
// many, or where rows end between vectors, they are laid out once as products take them.
template <class Elements, class Use>
MAX_INLINE void with_rows(const typename Elements::Type* in, const RowsOfPage& rows, int64_t num_queries, float* room,
                          const Use& use) {
  using Laid = typename Elements::Laid;
  constexpr int64_t kFewQueries = 4;
  const bool narrow = sizeof *in < sizeof(float);
  if (Elements::fits(rows) && !(narrow && num_queries > kFewQueries)) return use(Elements(), in, rows.stride, true);
  const int64_t laid_stride = (rows.width + kLanes - 1) / kLanes * kLanes;
  auto* laid = reinterpret_cast<typename Laid::Type*>(room);
  Elements::lay(in, rows, laid_stride, laid);
  use(Laid(), laid, laid_stride, false);
}
