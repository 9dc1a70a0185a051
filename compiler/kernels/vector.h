// Vectors of kLanes floats, for the instruction set that the including file is compiled for.
//
// Included once per instruction set, inside its namespace and behind its target pragma; needs kLanes, multiply_add(),
// load_bf16(), lane_bits(), which gives a comparison's lanes as bits, store_lanes(), which writes the lanes of such bits
// one after the other, and may write a whole vector, and for quantized weights load_f16(), load_bytes() and
// load_signed_bytes(). Nothing of the standard library may be instantiated there: the linker would keep one copy of it,
// perhaps that of the largest instruction set, for everybody.

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t Bits __attribute__((vector_size(4 * kLanes)));
typedef uint32_t UnsignedBits __attribute__((vector_size(4 * kLanes)));
typedef float VecAnywhere __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef int32_t BitsAnywhere __attribute__((vector_size(4 * kLanes), aligned(2), may_alias));

typedef int32_t BitsOfBytes __attribute__((vector_size(4 * kLanes), aligned(1), may_alias));
typedef int8_t NarrowBytes __attribute__((vector_size(kLanes)));
typedef uint16_t NarrowHalves __attribute__((vector_size(2 * kLanes)));

#define MAX_INLINE static inline __attribute__((always_inline))
#define MAX_MEMBER inline __attribute__((always_inline))

MAX_INLINE Vec load(const float* p) { return *reinterpret_cast<const VecAnywhere*>(p); }
MAX_INLINE void store(float* p, Vec v) { *reinterpret_cast<VecAnywhere*>(p) = v; }
MAX_INLINE Vec broadcast(float x) { return x - Vec{}; }
MAX_INLINE Bits load_bits(const uint8_t* p) { return *reinterpret_cast<const BitsOfBytes*>(p); }
MAX_INLINE void store_bits(uint8_t* p, Bits v) { *reinterpret_cast<BitsOfBytes*>(p) = v; }
MAX_INLINE Bits broadcast_bits(int32_t x) { return x - Bits{}; }

// Two neighbours of bfloat16 per lane; widening them is a shift and a mask.
MAX_INLINE Bits load_pairs(const uint16_t* p) { return *reinterpret_cast<const BitsAnywhere*>(p); }
MAX_INLINE Vec first_of_pairs(Bits pairs) { return reinterpret_cast<Vec>(pairs << 16); }
MAX_INLINE Vec second_of_pairs(Bits pairs) { return reinterpret_cast<Vec>(pairs & static_cast<int32_t>(0xffff0000u)); }

// NaN stays NaN in both, as the comparison is false then.
MAX_INLINE Vec at_least(Vec v, float low) { return broadcast(low) > v ? broadcast(low) : v; }
MAX_INLINE Vec at_most(Vec v, float high) { return broadcast(high) < v ? broadcast(high) : v; }

// e ** x within 2 ulp for x <= 88, 0 for x < -87; Cephes' expf polynomial after a reduction by powers of two.
MAX_INLINE Vec exponential(Vec x) {
  const Vec bounded = at_most(at_least(x, -87.0f), 88.0f);
  const Vec shifted = multiply_add(bounded, broadcast(1.44269504f), broadcast(12582912.0f));
  const Vec power = shifted - 12582912.0f;
  Vec r = multiply_add(power, broadcast(-0.693359375f), bounded);
  r = multiply_add(power, broadcast(2.12194440e-4f), r);
  Vec p = broadcast(1.9875691500e-4f);
  p = multiply_add(p, r, broadcast(1.3981999507e-3f));
  p = multiply_add(p, r, broadcast(8.3334519073e-3f));
  p = multiply_add(p, r, broadcast(4.1665795894e-2f));
  p = multiply_add(p, r, broadcast(1.6666665459e-1f));
  p = multiply_add(p, r, broadcast(5.0000001201e-1f));
  p = multiply_add(p, r * r, r + 1.0f);
  const Vec scaled = reinterpret_cast<Vec>(reinterpret_cast<Bits>(p) + (reinterpret_cast<Bits>(shifted) << 23));
  return x < -87.0f ? Vec{} : scaled;
}

// e ** x for x <= 0 within 3e-7 of it, but for -87 and less, which give 1.6e-38: what softmax needs, at half the cost. A
// minimax polynomial of 2 ** r on [-0.5, 0.5]. A greater x, as scores of keys that are not seen may give, wraps around.
MAX_INLINE Vec exponential_below_one(Vec x) {
  const Vec log2_e = broadcast(1.44269504f), bounded = at_least(x, -87.0f);
  const Vec shifted = multiply_add(bounded, log2_e, broadcast(12582912.0f));
  const Vec r = multiply_add(bounded, log2_e, 12582912.0f - shifted);
  Vec p = broadcast(1.32647308e-3f);
  p = multiply_add(p, r, broadcast(9.67151299e-3f));
  p = multiply_add(p, r, broadcast(5.55073359e-2f));
  p = multiply_add(p, r, broadcast(2.40222424e-1f));
  p = multiply_add(p, r, broadcast(6.93147004e-1f));
  p = multiply_add(p, r, broadcast(1.0f));
  return reinterpret_cast<Vec>(reinterpret_cast<UnsignedBits>(p) + (reinterpret_cast<UnsignedBits>(shifted) << 23));
}

// tanh x within 2 ulp: Cephes' tanhf polynomial near 0, and (1 - e) / (1 + e) with e = e ** -2|x| elsewhere.
MAX_INLINE Vec hyperbolic_tangent(Vec x) {
  const Vec magnitude = x < 0.0f ? -x : x, square = x * x;
  Vec p = broadcast(-5.70498872745e-3f);
  p = multiply_add(p, square, broadcast(2.06390887954e-2f));
  p = multiply_add(p, square, broadcast(-5.37397155531e-2f));
  p = multiply_add(p, square, broadcast(1.33314422036e-1f));
  p = multiply_add(p, square, broadcast(-3.33332819422e-1f));
  const Vec near_zero = multiply_add(p * square, x, x);
  const Vec e = exponential(magnitude * -2.0f);
  const Vec far = (1.0f - e) / (1.0f + e);
  return magnitude < 0.625f ? near_zero : x < 0.0f ? -far : far;
}

template <int... I>
struct Indices {};
template <int N, int... I>
struct MakeIndices : MakeIndices<N - 1, N - 1, I...> {};
template <int... I>
struct MakeIndices<0, I...> {
  using type = Indices<I...>;
};
using Lanes = typename MakeIndices<kLanes>::type;

MAX_INLINE float sum_of(Vec v) {
  float sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += v[i];
  return sum;
}

template <int Distance, class AnyVec, int... I>
MAX_INLINE AnyVec swap_lanes(AnyVec v, Indices<I...>) {
#if defined(__clang__)
  return __builtin_shufflevector(v, v, (I ^ Distance)...);
#else
  return __builtin_shuffle(v, Bits{(I ^ Distance)...});
#endif
}

template <int Distance = kLanes / 2>
MAX_INLINE float highest_of(Vec v) {
  if constexpr (Distance == 0) {
    return v[0];
  } else {
    const Vec other = swap_lanes<Distance>(v, Lanes());
    return highest_of<Distance / 2>(other > v ? other : v);
  }
}

// The sum of all lanes, in each of them.
template <int Distance = kLanes / 2, class AnyVec>
MAX_INLINE AnyVec spread_sum(AnyVec v) {
  if constexpr (Distance == 0) {
    return v;
  } else {
    return spread_sum<Distance / 2>(v + swap_lanes<Distance>(v, Lanes()));
  }
}
