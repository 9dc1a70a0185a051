// The highest values of a row, without sorting it: a bound that few values reach, then those that do. Included as
// vector.h is; needs lane_bits().

// A row cut into stripes of a few vectors. Each has a vector of `maxima`, the highest of its vectors lane by lane: as
// many groups of values, of which k with a maximum of at least some bound prove that k values reach it.
struct Stripes {
  const float* x;
  int64_t count;
  int64_t vectors;  // of a stripe
  float* maxima;

  int64_t width() const { return vectors * kLanes; }
  int64_t number() const { return (count + width() - 1) / width(); }
};

// Vectors of a stripe such that a row has more than k groups, if it can; few groups make the bound quick to find.
MAX_INLINE int64_t vectors_of_stripe(int64_t count, int64_t k) {
  const int64_t fitting = count / (4 * (k + 16));
  return fitting < 1 ? 1 : fitting > 8 ? 8 : fitting;
}

// As many values are added up in float32, in lanes; the sums of such chunks are added in float64.
constexpr int64_t kSumChunk = 64 * kLanes;

// A whole vector, or what is left of the row in front of -inf.
MAX_INLINE Vec load_up_to(const float* x, int64_t count) {
  if (count >= kLanes) return load(x);
  Vec v = broadcast(-__builtin_inff());
  for (int64_t i = 0; i < count; ++i) v[i] = x[i];
  return v;
}

// Fills the maxima, and returns the highest of them; NaN is passed over, and told where `has_nan` is given.
static float fill_maxima(const Stripes& s, bool* has_nan = nullptr) {
  Vec highest = broadcast(-__builtin_inff());
  Bits unordered{};
  for (int64_t i = 0; i < s.number(); ++i) {
    const int64_t begin = i * s.width();
    const int64_t end = s.count < begin + s.width() ? s.count : begin + s.width();
    Vec of_stripe = broadcast(-__builtin_inff());
    for (int64_t at = begin; at < end; at += kLanes) {
      const Vec v = load_up_to(s.x + at, end - at);
      of_stripe = v > of_stripe ? v : of_stripe;
      unordered |= v != v;
    }
    store(s.maxima + i * kLanes, of_stripe);
    highest = of_stripe > highest ? of_stripe : highest;
  }
  if (has_nan != nullptr) *has_nan = lane_bits(unordered) != 0;
  return highest_of(highest);
}

// Floats as integers of the same order, and back.
MAX_INLINE int32_t order_of(float x) {
  int32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return bits < 0 ? bits ^ 0x7fffffff : bits;
}
MAX_INLINE float of_order(int32_t order) {
  const int32_t bits = order < 0 ? order ^ 0x7fffffff : order;
  float x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}

// Whole vectors only.
MAX_INLINE int64_t count_reaching(const float* values, int64_t vectors, float bound) {
  Bits counts{};
  for (int64_t i = 0; i < vectors; ++i) counts -= load(values + i * kLanes) >= broadcast(bound);
  int64_t sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += counts[i];
  return sum;
}

// A bound that at least k values of some vectors reach, and at most `more` others, or only ones that equal it.
// `highest` is the highest of them, and k at most their number.
static float reached_by(const float* values, int64_t vectors, int64_t k, int64_t more, float highest) {
  int64_t low = order_of(-__builtin_inff()), high = order_of(highest);
  while (low < high) {
    const int64_t middle = low + (high - low + 1) / 2;
    const int64_t reaching = count_reaching(values, vectors, of_order(static_cast<int32_t>(middle)));
    if (reaching >= k) low = middle;
    if (reaching >= k && reaching <= k + more) break;
    if (reaching < k) high = middle - 1;
  }
  return of_order(static_cast<int32_t>(low));
}

// The values that reach `bound`, with their columns in ascending order; returns how many. Room for all is there.
static int64_t collect_reaching(const Stripes& s, float bound, float* values, int32_t* columns) {
  int64_t found = 0;
  for (int64_t i = 0; i < s.number(); ++i) {
    if (lane_bits(load(s.maxima + i * kLanes) >= broadcast(bound)) == 0) continue;
    const int64_t begin = i * s.width();
    const int64_t end = s.count < begin + s.width() ? s.count : begin + s.width();
    for (int64_t at = begin; at < end; at += kLanes) {
      uint32_t reaching = lane_bits(load_up_to(s.x + at, end - at) >= broadcast(bound));
      if (end - at < kLanes) reaching &= (1u << (end - at)) - 1;
      for (; reaching != 0; reaching &= reaching - 1, ++found) {
        const int64_t column = at + __builtin_ctz(reaching);
        values[found] = s.x[column];
        columns[found] = static_cast<int32_t>(column);
      }
    }
  }
  return found;
}
