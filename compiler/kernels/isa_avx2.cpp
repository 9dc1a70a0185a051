// The kernels for AVX2 with FMA.
#if defined(__x86_64__) && !defined(MAX_KERNELS_PORTABLE)
#include <immintrin.h>

#include <cstdint>

#include "isa.h"
#include "quantize.h"
#include "quantized_layout.h"
#include "target.h"
MAX_TARGET("avx2,fma,f16c")

namespace max_kernels {
namespace avx2 {

constexpr int kLanes = 8;
constexpr int kWideRows = 3, kTallRows = 6, kTallVectors = 2;
constexpr int kWidePairRows = 1, kTallPairRows = 4;
constexpr int kDotWideRows = 1, kDotTallRows = 3, kDotTallVectors = 2;
constexpr int kRegisters = 16;
constexpr int kAttendRows = 3, kAttendVectors = 4;

static inline __m256 multiply_add(__m256 a, __m256 b, __m256 c) { return _mm256_fmadd_ps(a, b, c); }
static inline __m256 load_bf16(const uint16_t* p) {
  const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}
static inline __m256 load_f16(const uint16_t* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
typedef int32_t EightInts __attribute__((vector_size(32)));
static inline uint32_t lane_bits(EightInts lanes) { return _mm256_movemask_ps(reinterpret_cast<__m256>(lanes)); }
static inline void store_lanes(float* p, __m256 v, uint32_t bits) {
  for (; bits != 0; bits &= bits - 1) *p++ = v[__builtin_ctz(bits)];
}
static inline __m256i load_bytes(const uint8_t* p) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}
static inline __m256i load_signed_bytes(const uint8_t* p) {
  return _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}

#include "vector.h"
#include "dot_int16.h"
#include "tile.h"
#include "activation.h"
#include "matmul_panel.h"
#include "quantized_inputs.h"
#include "quantize_block.h"
#include "quantized_formats.h"
#include "matmul_quantized.h"
#include "matmul_widened.h"
#include "attention_pages.h"
#include "attention_blocks.h"
#include "attention_widened.h"
#include "attention_tile.h"
#include "argmax_row.h"
#include "top_values.h"
#include "sample_row.h"
#include "logprobs_row.h"
#include "norm_row.h"
#include "memory_read.h"

}  // namespace avx2

const Kernels kAvx2Kernels = {
    "avx2",
    avx2::matmul_panel_f32,
    avx2::matmul_panel_bf16,
    {avx2::matmul_panel_quantized<avx2::Q8Format>, avx2::matmul_panel_quantized<avx2::Q4Format>,
     avx2::matmul_panel_quantized<avx2::Q4KFormat>, avx2::matmul_panel_quantized<avx2::Q6KFormat>},
    nullptr,
    {avx2::kDotWideRows, avx2::kDotTallRows},
    avx2::quantize_inputs,
    avx2::quantize_block,
    avx2::write_tokens,
    avx2::attend,
    avx2::attend_segment,
    avx2::merge_segments,
    avx2::argmax_row,
    avx2::sample_row,
    avx2::logprobs_row,
    avx2::norm_row,
    avx2::read_memory,
};

}  // namespace max_kernels
MAX_TARGET_END
#endif
