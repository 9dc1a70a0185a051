// Products of bytes in 16-bit lanes, for instruction sets without a product of bytes. Included as vector.h is.

typedef int16_t Halves __attribute__((vector_size(4 * kLanes)));

constexpr int32_t kQ8Offset = 0;  // the codes are made signed before they are multiplied

// Codes up to kLargest, times inputs from -127 to 127: a 16-bit lane holds kSteps sums of two products.
template <int kLargest>
struct Dot {
  struct Pair {
    Halves even, odd;
  };
  using Weights = Pair;
  using Inputs = Pair;
  using Sum = Halves;
  static constexpr int kSteps = kLargest == 15 ? 8 : kLargest == 63 ? 2 : 1;
  MAX_INLINE Pair widen(Bits bytes) {
    const Halves halves = reinterpret_cast<Halves>(bytes);
    return {(halves << 8) >> 8, halves >> 8};
  }
  MAX_INLINE Weights weights(Bits codes) {
    return widen(kLargest == 128 ? codes ^ static_cast<int32_t>(0x80808080u) : codes);
  }
  MAX_INLINE Inputs inputs(Bits four) { return widen(four); }
  MAX_INLINE Sum begin(Bits) { return Sum{}; }
  MAX_INLINE Sum add(Sum sum, Weights w, Inputs x) { return sum + w.even * x.even + w.odd * x.odd; }
  MAX_INLINE Bits end(Bits total, Sum sum) {
    const Bits pairs = reinterpret_cast<Bits>(sum);
    return total + ((pairs << 16) >> 16) + (pairs >> 16);
  }
};
