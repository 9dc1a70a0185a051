// Products of bytes with AVX-512 VNNI. Included as vector.h is.

constexpr int32_t kQ8Offset = 128;

template <int kLargest>
struct Dot {
  using Weights = __m512i;
  using Inputs = __m512i;
  using Sum = __m512i;
  static constexpr int kSteps = 8;
  MAX_INLINE Weights weights(Bits codes) { return reinterpret_cast<__m512i>(codes); }
  MAX_INLINE Inputs inputs(Bits four) { return reinterpret_cast<__m512i>(four); }
  MAX_INLINE Sum begin(Bits total) { return reinterpret_cast<__m512i>(total); }
  MAX_INLINE Sum add(Sum sum, Weights w, Inputs x) { return _mm512_dpbusd_epi32(sum, w, x); }
  MAX_INLINE Bits end(Bits, Sum sum) { return reinterpret_cast<Bits>(sum); }
};
