// Products of a tile's queries with the keys of a block, and of their weights with its values. Included as vector.h is;
// needs kAttendRows and kAttendVectors, the queries and vectors whose sums fit the registers.
//
// Both are small matmuls over pages as they lie, keys one per lane and values in rows; each sum takes one element, or
// value, after the other, whatever the number of queries.

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

// A row of elements is `width` long, and the next one lies `stride` elements behind it.
struct RowsOfPage {
  int64_t count, width, stride;
};

// Rows as float32, `laid_stride` floats apart with zeros behind each.
template <class Elements>
static void widen(const typename Elements::Type* in, const RowsOfPage& rows, int64_t laid_stride, float* laid) {
  for (int64_t n = 0; n < rows.count; ++n, in += rows.stride, laid += laid_stride) {
    prefetch_ahead(in, rows.width * static_cast<int64_t>(sizeof *in));
    for (int64_t i = 0; i < laid_stride; i += kLanes) store(laid + i, load_part<Elements>(in + i, rows.width - i));
  }
}

// Calls use(elements, rows, stride, in place) with rows of whole vectors. Few queries read elements where they lie; for
// many, or where rows end between vectors, they are widened once.
template <class Elements, class Use>
MAX_INLINE void with_rows(const typename Elements::Type* in, const RowsOfPage& rows, int64_t num_queries, float* laid,
                          const Use& use) {
  constexpr int64_t kFewQueries = 4;
  const bool narrow = sizeof *in < sizeof(float);
  if (rows.width % kLanes == 0 && !(narrow && num_queries > kFewQueries))
    return use(Elements(), in, rows.stride, true);
  const int64_t laid_stride = (rows.width + kLanes - 1) / kLanes * kLanes;
  widen<Elements>(in, rows, laid_stride, laid);
  use(FloatElements(), laid, laid_stride, false);
}
