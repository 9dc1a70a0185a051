// The index of a row's highest value. Included as vector.h is.

// The first of equal ones, or -1 where one is NaN.
static int64_t argmax_row(const float* x, int64_t count) {
  constexpr int64_t kChunk = 64 * kLanes;
  int64_t best_chunk = 0;
  float best = -__builtin_inff();
  for (int64_t begin = 0; begin < count; begin += kChunk) {
    const int64_t end = count - begin < kChunk ? count : begin + kChunk;
    Vec highest = broadcast(-__builtin_inff()), unordered{};
    int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes) {
      const Vec v = load(x + i);
      highest = v > highest ? v : highest;
      unordered = v == v ? unordered : broadcast(1.0f);
    }
    bool has_nan = highest_of(unordered) > 0;
    float of_chunk = highest_of(highest);
    for (; i < end; ++i) {
      has_nan |= x[i] != x[i];
      of_chunk = x[i] > of_chunk ? x[i] : of_chunk;
    }
    if (has_nan) return -1;
    if (of_chunk > best) {
      best = of_chunk;
      best_chunk = begin;
    }
  }
  int64_t i = best_chunk;
  while (x[i] != best) ++i;
  return i;
}
