// From floats to the blocks of GGUF's formats: q8_0 and q4_0 as GGUF's own quantizer, q4_k and q6_k by a search for the
// scales of least squared error. Included as vector.h is.
//
// A search tries its candidates in the lanes of vectors, so that each sum goes over the elements in their order: blocks are
// the same bits on every instruction set.

constexpr float kNearest = 12582912.0f;  // adding 3 * 2**22 rounds to the nearest integer, ties to even

// Rounded within bounds; NaN becomes the lowest.
MAX_INLINE Vec nearest_within(Vec x, float low, float high) {
  const Vec above = x > low ? x : broadcast(low);
  return ((above < high ? above : broadcast(high)) + kNearest) - kNearest;
}

MAX_INLINE void store_codes(uint8_t* to, Bits codes) {
  const NarrowBytes narrow = __builtin_convertvector(codes, NarrowBytes);
  __builtin_memcpy(to, &narrow, sizeof narrow);
}

// The first element of largest magnitude, 0 where there is none but NaN.
template <int Count>
MAX_INLINE float extreme_of(const float* x) {
  Vec largest{};
  for (int k = 0; k < Count; k += kLanes) {
    const Vec magnitude = reinterpret_cast<Vec>(reinterpret_cast<Bits>(load(x + k)) & 0x7fffffff);
    largest = magnitude > largest ? magnitude : largest;
  }
  const float highest = highest_of(largest);
  for (int k = 0; k < Count && highest > 0; ++k) {
    if (x[k] == highest || x[k] == -highest) return x[k];
  }
  return 0;
}

// The largest magnitude / 127 is the scale; halves go away from zero.
static void quantize_q8_0(const float* x, uint8_t* gguf) {
  const float extreme = extreme_of<32>(x), unit = (extreme < 0 ? -extreme : extreme) / 127;
  const float per_unit = unit == 0 ? 0 : 1 / unit;
  uint8_t codes[32];
  for (int k = 0; k < 32; k += kLanes) {
    const Vec value = load(x + k) * per_unit, even = (value + kNearest) - kNearest, off = value - even;
    const Vec up = off == 0.5f ? (value > 0.0f ? broadcast(1) : Vec{}) : Vec{};
    const Vec down = off == -0.5f ? (value < 0.0f ? broadcast(1) : Vec{}) : Vec{};
    store_codes(codes + k, __builtin_convertvector(even + up - down, Bits));
  }
  write_q8_0(round_to_f16(unit), codes, gguf);
}

// The element of largest magnitude becomes -8, so that the side on which it lies has one code more.
static void quantize_q4_0(const float* x, uint8_t* gguf) {
  const float unit = extreme_of<32>(x) / -8, per_unit = unit == 0 ? 0 : 1 / unit;
  uint8_t codes[32];
  for (int k = 0; k < 32; k += kLanes) {
    const Vec code = load(x + k) * per_unit + 8.5f;
    store_codes(codes + k, __builtin_convertvector(code < 15.0f ? code : broadcast(15), Bits));
  }
  write_q4_0(round_to_f16(unit), codes, gguf);
}

constexpr int kTried = 31;
constexpr int kTriedPadded = 32;  // whole vectors

// first / 10, (first + 1) / 10, ...: the divisions of a range that are tried.
struct Divisions {
  alignas(64) float at[kTriedPadded];
  constexpr explicit Divisions(int first) : at() {
    for (int i = 0; i < kTriedPadded; ++i) at[i] = 0.1f * static_cast<float>(first + i);
  }
};

// Lines x ~ scale * code + low, one in each lane, with codes 0 to 15.
struct Lines {
  Vec scale, low;

  MAX_MEMBER Vec per_unit() const { return scale == 0.0f ? Vec{} : 1.0f / scale; }

  // The squared error of 32 elements.
  MAX_MEMBER Vec error(const float* x) const {
    const Vec factor = per_unit();
    Vec error{};
#pragma GCC unroll 4
    for (int k = 0; k < 32; ++k) {
      const Vec code = nearest_within((x[k] - low) * factor, 0, 15);
      const Vec difference = x[k] - (scale * code + low);
      error = error + difference * difference;
    }
    return error;
  }

  // The lines, with a low of at most 0, that fit best the codes which these ones give.
  MAX_MEMBER Lines fitted(const float* x, float sum_x) const {
    const Vec factor = per_unit();
    Vec sum_q{}, sum_qq{}, sum_xq{};
#pragma GCC unroll 4
    for (int k = 0; k < 32; ++k) {
      const Vec code = nearest_within((x[k] - low) * factor, 0, 15);
      sum_q = sum_q + code;
      sum_qq = sum_qq + code * code;
      sum_xq = sum_xq + x[k] * code;
    }
    const Vec determinant = 32.0f * sum_qq - sum_q * sum_q;
    const Vec best_low = (sum_qq * sum_x - sum_q * sum_xq) / determinant;
    const Vec best_scale = (32.0f * sum_xq - sum_q * sum_x) / determinant;
    const Vec bounded_low = best_low > 0.0f ? Vec{} : best_low;
    const Vec bounded_scale = best_low > 0.0f ? sum_xq / sum_qq : best_scale;
    return {determinant <= 0.0f ? scale : bounded_scale, determinant <= 0.0f ? low : bounded_low};
  }
};

// A block's scale and low: from divisions of its range in about 15 steps the one that leaves the least squared error.
static void search_line(const float* x, float& scale, float& low) {
  static constexpr Divisions kDivisions(135);
  float lowest = 0, highest = x[0], sum_x = 0;
  for (int k = 0; k < 32; ++k) {
    lowest = x[k] < lowest ? x[k] : lowest;
    highest = highest < x[k] ? x[k] : highest;
    sum_x += x[k];
  }
  const float range = highest - lowest;
  scale = 0, low = lowest;
  if (!(range > 0)) return;
  alignas(64) float scales[kTriedPadded], lows[kTriedPadded], errors[kTriedPadded];
  for (int i = 0; i < kTriedPadded; i += kLanes) {
    const Lines tried{range / load(kDivisions.at + i), broadcast(lowest)}, best = tried.fitted(x, sum_x);
    store(scales + i, best.scale);
    store(lows + i, best.low);
    store(errors + i, best.error(x));
  }
  float least = __builtin_inff();
  for (int i = 0; i < kTried; ++i) {
    if (errors[i] < least) least = errors[i], scale = scales[i], low = lows[i];
  }
}

// Of the 6-bit scale and minimum nearest to what was sought and their neighbours, those of least squared error.
static void settle_line(const float* x, float unit, float minimum_unit, float scale, float low, uint8_t* chosen_scale,
                        uint8_t* chosen_minimum, uint8_t* codes) {
  constexpr int kPairs = 9, kPadded = (kPairs + kLanes - 1) / kLanes * kLanes;
  const int near_scale = unit == 0 ? 0 : static_cast<int>(__builtin_nearbyintf(scale / unit));
  const int near_minimum = minimum_unit == 0 ? 0 : static_cast<int>(__builtin_nearbyintf(-low / minimum_unit));
  alignas(64) float scales[kPadded] = {}, lows[kPadded] = {}, errors[kPadded];
  for (int i = 0; i < kPairs; ++i) {
    scales[i] = unit * static_cast<float>(near_scale - 1 + i / 3);
    lows[i] = -minimum_unit * static_cast<float>(near_minimum - 1 + i % 3);
  }
  for (int i = 0; i < kPadded; i += kLanes) store(errors + i, Lines{load(scales + i), load(lows + i)}.error(x));
  float least = __builtin_inff();
  int best = -1;
  for (int i = 0; i < kPairs; ++i) {
    const int s = near_scale - 1 + i / 3, m = near_minimum - 1 + i % 3;
    if (s >= 0 && s <= 63 && m >= 0 && m <= 63 && errors[i] < least) least = errors[i], best = i;
  }
  *chosen_scale = static_cast<uint8_t>(best < 0 ? 0 : near_scale - 1 + best / 3);
  *chosen_minimum = static_cast<uint8_t>(best < 0 ? 0 : near_minimum - 1 + best % 3);
  const float step = best < 0 ? 0 : scales[best], from = best < 0 ? 0 : lows[best], per_unit = step == 0 ? 0 : 1 / step;
  for (int k = 0; k < 32; k += kLanes) {
    const Vec code = nearest_within((load(x + k) - from) * per_unit, 0, 15);
    store_codes(codes + k, __builtin_convertvector(code, Bits));
  }
}

static void quantize_q4_k(const float* x, uint8_t* gguf) {
  float scale[8], low[8], highest = 0, lowest = 0;
  for (int i = 0; i < 8; ++i) {
    search_line(x + 32 * i, scale[i], low[i]);
    highest = scale[i] > highest ? scale[i] : highest;
    lowest = low[i] < lowest ? low[i] : lowest;
  }
  const uint16_t unit = unit_of_6_bits(highest), minimum_unit = unit_of_6_bits(-lowest);
  uint8_t scales[8], minima[8], codes[256];
  for (int i = 0; i < 8; ++i) {
    settle_line(x + 32 * i, widen_f16(unit), widen_f16(minimum_unit), scale[i], low[i], scales + i, minima + i,
                codes + 32 * i);
  }
  write_q4_k(unit, minimum_unit, scales, minima, codes, gguf);
}

// The scale of 16 elements: from divisions of the largest magnitude in about 32 the one that leaves the least squared error.
static float search_scale(const float* x) {
  static constexpr Divisions kDivisions(-330);
  const float extreme = extreme_of<16>(x);
  if (extreme == 0) return 0;
  alignas(64) float scales[kTriedPadded], explained[kTriedPadded];  // of the sum of squares
  for (int i = 0; i < kTriedPadded; i += kLanes) {
    const Vec per_unit = load(kDivisions.at + i) / extreme;
    Vec sum_xq{}, sum_qq{};
#pragma GCC unroll 4
    for (int k = 0; k < 16; ++k) {
      const Vec code = nearest_within(x[k] * per_unit, -32, 31);
      sum_xq = sum_xq + x[k] * code;
      sum_qq = sum_qq + code * code;
    }
    store(scales + i, sum_xq / sum_qq);
    store(explained + i, sum_xq * sum_xq / sum_qq);  // NaN where all codes are 0
  }
  float scale = 0, most = 0;
  for (int i = 0; i < kTried; ++i) {
    if (explained[i] > most) most = explained[i], scale = scales[i];
  }
  return scale;
}

static void quantize_q6_k(const float* x, uint8_t* gguf) {
  float scale[16];
  for (int i = 0; i < 16; ++i) scale[i] = search_scale(x + 16 * i);
  const uint16_t half = round_to_f16(extreme_of<16>(scale) / -128);
  const float unit = widen_f16(half);
  int8_t scales[16];
  uint8_t codes[256];
  for (int i = 0; i < 16; ++i) {
    const float wanted = unit == 0 ? 0 : __builtin_nearbyintf(scale[i] / unit);
    const float chosen = wanted > 127 ? 127 : wanted > -128 ? wanted : -128;
    scales[i] = static_cast<int8_t>(chosen);
    const float step = unit * chosen, per_unit = step == 0 ? 0 : 1 / step;
    for (int k = 16 * i; k < 16 * i + 16; k += kLanes) {
      const Vec code = nearest_within(load(x + k) * per_unit, -32, 31);
      store_codes(codes + k, __builtin_convertvector(code, Bits) + 32);
    }
  }
  write_q6_k(half, scales, codes, gguf);
}

static void quantize_block(Encoding encoding, const float* elements, uint8_t* gguf) {
  if (encoding == Encoding::kQ8_0) return quantize_q8_0(elements, gguf);
  if (encoding == Encoding::kQ4_0) return quantize_q4_0(elements, gguf);
  if (encoding == Encoding::kQ4K) return quantize_q4_k(elements, gguf);
  quantize_q6_k(elements, gguf);
}
