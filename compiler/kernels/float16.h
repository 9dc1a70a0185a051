// Widening of float16 where no instruction does it. Included as vector.h is.

// float16 of any finite value; exact, also below 2**-14, where denormals of float32 would be flushed.
MAX_INLINE Vec load_f16(const uint16_t* p) {
  const Bits half = reinterpret_cast<Bits>(load_bf16(p));  // its bits in the upper half of each lane
  const Bits magnitude = (half >> 3) & 0x0fffe000;
  const Vec normal = reinterpret_cast<Vec>(magnitude + (112 << 23));
  const Vec tiny = __builtin_convertvector((half >> 16) & 0x3ff, Vec) * 0x1p-24f;
  const Vec value = magnitude < (1 << 23) ? tiny : normal;
  return half < 0 ? -value : value;
}
