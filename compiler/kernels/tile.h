// The inner products of a few rows with a few vectors of columns, held in registers. Included as vector.h is.

struct TileShape {
  const float* x;  // rows of inputs
  int64_t x_stride;
  float* y;
  int64_t y_stride;
  int64_t num_inputs;
  bool add;  // to what is in y
  Hints hints = Hints::kNone;
};

MAX_INLINE void hint(Hints hints, const void* line) {
  if (hints == Hints::kFirstCache) {
    __builtin_prefetch(line, 0, 3);
  } else if (hints == Hints::kSecondCache) {
    __builtin_prefetch(line, 0, 2);
  }
}

// Loops over sums are unrolled: an index that is known only at run time would keep them in memory.
template <int Rows, int Vectors>
MAX_INLINE void start(const TileShape& t, Vec (&sum)[Rows][Vectors]) {
  if (t.add) {
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 16
      for (int v = 0; v < Vectors; ++v) sum[r][v] = load(t.y + r * t.y_stride + v * kLanes);
  } else {
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 16
      for (int v = 0; v < Vectors; ++v) sum[r][v] = Vec{};
  }
}

template <int Rows, int Vectors>
MAX_INLINE void finish(const TileShape& t, const Vec (&sum)[Rows][Vectors]) {
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 16
    for (int v = 0; v < Vectors; ++v) store(t.y + r * t.y_stride + v * kLanes, sum[r][v]);
}

// The inputs of a tile's rows, with a pointer for every three of them: an address takes a pointer and the stride once or
// twice, so that a step of the inputs moves a third of the pointers, and all fit the registers.
template <int Rows>
struct InputRows {
  static constexpr int kRowsOfPointer = 3, kPointers = (Rows + kRowsOfPointer - 1) / kRowsOfPointer;
  const float* pointers[kPointers];
  int64_t stride;

  MAX_MEMBER explicit InputRows(const TileShape& t) : stride(t.x_stride) {
#pragma GCC unroll 16
    for (int p = 0; p < kPointers; ++p) {
      pointers[p] = t.x + p * kRowsOfPointer * stride;
      asm("" : "+r"(pointers[p]));  // or the compiler makes one of all of them again
    }
  }
  MAX_MEMBER const float* row(int r) const { return pointers[r / kRowsOfPointer] + r % kRowsOfPointer * stride; }
  MAX_MEMBER void advance(int64_t inputs) {
#pragma GCC unroll 16
    for (int p = 0; p < kPointers; ++p) pointers[p] += inputs;
  }
};

// Adds the products of the input `at` of each row.
template <int Rows, int Vectors>
MAX_INLINE void accumulate(const InputRows<Rows>& x, int64_t at, const Vec (&w)[Vectors], Vec (&sum)[Rows][Vectors]) {
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r) {
    const Vec input = broadcast(x.row(r)[at]);
#pragma GCC unroll 16
    for (int v = 0; v < Vectors; ++v) sum[r][v] = multiply_add(w[v], input, sum[r][v]);
  }
}

// One hint per cache line of the vectors.
template <int Vectors>
MAX_INLINE void hint_ahead(const TileShape& t, const void* weights) {
  for (int64_t at = 0; at < Vectors * kLanes * 4; at += 64)
    hint(t.hints, static_cast<const char*>(weights) + kHintBytes + at);
}

// One input after the other, whatever the number of rows: this is the order that every row keeps.
template <int Rows, int Vectors>
static void multiply_f32(const TileShape& t, const float* w, int64_t w_stride) {
  Vec sum[Rows][Vectors];
  start(t, sum);
  InputRows<Rows> x(t);
  for (int64_t k = 0; k < t.num_inputs; ++k, w += w_stride, x.advance(1)) {
    Vec weights[Vectors];
    for (int v = 0; v < Vectors; ++v) weights[v] = load(w + v * kLanes);
    hint_ahead<Vectors>(t, w);
    accumulate(x, 0, weights, sum);
  }
  finish(t, sum);
}

// w: pairs of inputs, [K/2][columns][2]; its stride counts from pair to pair.
template <int Rows, int Vectors>
static void multiply_bf16(const TileShape& t, const uint16_t* w, int64_t w_stride) {
  Vec sum[Rows][Vectors];
  start(t, sum);
  InputRows<Rows> x(t);
  for (int64_t k = 0; k < t.num_inputs; k += 2, w += w_stride, x.advance(2)) {
    Vec first[Vectors], second[Vectors];
    for (int v = 0; v < Vectors; ++v) {
      const Bits pairs = load_pairs(w + v * 2 * kLanes);
      first[v] = first_of_pairs(pairs);
      second[v] = second_of_pairs(pairs);
    }
    hint_ahead<Vectors>(t, w);
    accumulate(x, 0, first, sum);
    if (k + 1 < t.num_inputs) accumulate(x, 1, second, sum);
  }
  finish(t, sum);
}

template <class Weight>
using Multiply = void (*)(const TileShape&, const Weight*, int64_t);

// The tiles of 1 to N rows, as a table indexed by the number of rows less one.
template <int Vectors, class Rows>
struct Tiles;
template <int Vectors, int... R>
struct Tiles<Vectors, Indices<R...>> {
  static constexpr Multiply<float> f32[] = {multiply_f32<R + 1, Vectors>...};
  static constexpr Multiply<uint16_t> bf16[] = {multiply_bf16<R + 1, Vectors>...};
};
