// What vector.h needs of AVX-512, for each of its variants. Included inside their namespaces.

constexpr int kLanes = 16;
constexpr int kWideRows = 12, kTallRows = 12, kTallVectors = 2;
constexpr int kWidePairRows = 12, kTallPairRows = 12;
constexpr int kAttendRows = 6, kAttendVectors = 4;
constexpr int kDotWideRows = 12, kDotTallRows = 6, kDotTallVectors = 2;
constexpr int kRegisters = 32;

static inline __m512 multiply_add(__m512 a, __m512 b, __m512 c) { return _mm512_fmadd_ps(a, b, c); }
static inline __m512 load_bf16(const uint16_t* p) {
  const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}
static inline __m512 load_f16(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
typedef int32_t SixteenInts __attribute__((vector_size(64)));
static inline uint32_t lane_bits(SixteenInts lanes) { return _mm512_movepi32_mask(reinterpret_cast<__m512i>(lanes)); }
static inline void store_lanes(float* p, __m512 v, uint32_t bits) {
  _mm512_storeu_ps(p, _mm512_maskz_compress_ps(static_cast<__mmask16>(bits), v));
}
static inline __m512i load_bytes(const uint8_t* p) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
static inline __m512i load_signed_bytes(const uint8_t* p) {
  return _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
