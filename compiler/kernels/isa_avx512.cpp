// The kernels for AVX-512 (F, BW, DQ, VL).
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdint>

#include "isa.h"
#include "target.h"
MAX_TARGET("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")

namespace max_kernels {
namespace avx512 {

constexpr int kLanes = 16;
constexpr int kWideRows = 12, kTallRows = 12, kTallVectors = 2;
constexpr int kWidePairRows = 12, kTallPairRows = 12;
constexpr int kAttendRows = 6, kAttendVectors = 4;

static inline __m512 multiply_add(__m512 a, __m512 b, __m512 c) { return _mm512_fmadd_ps(a, b, c); }
static inline __m512 load_bf16(const uint16_t* p) {
  const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}
static inline __m512 load_int8(const int8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
static inline uint32_t lane_bits(__m512i lanes) { return _mm512_movepi32_mask(lanes); }

#include "vector.h"
#include "tile.h"
#include "matmul_panel.h"
#include "matmul_widened.h"
#include "attention_tile.h"
#include "argmax_row.h"
#include "top_values.h"
#include "logprobs_row.h"
#include "memory_read.h"

}  // namespace avx512

const Kernels kAvx512Kernels = {
    "avx512",
    avx512::matmul_panel_f32,
    avx512::matmul_panel_bf16,
    avx512::matmul_panel_q8,
    nullptr,
    avx512::write_token,
    avx512::attend,
    avx512::argmax_row,
    avx512::logprobs_row,
    avx512::read_memory,
};

}  // namespace max_kernels
MAX_TARGET_END
#endif
