// The kernels for any CPU, in vectors of 4 floats: SSE2 on x86-64, NEON on aarch64. With MAX_KERNELS_PORTABLE they are all
// that there is, without an intrinsic of any CPU.
#include <cstdint>

#include "isa.h"
#include "quantize.h"
#include "quantized_layout.h"

#if defined(__aarch64__)
#include <arm_neon.h>
#elif defined(__SSE2__) && !defined(MAX_KERNELS_PORTABLE)
#include <xmmintrin.h>
#endif

namespace max_kernels {
namespace baseline {

constexpr int kLanes = 4;
constexpr int kWideRows = 1, kTallRows = 4, kTallVectors = 2;
constexpr int kWidePairRows = 1, kTallPairRows = 4;
constexpr int kDotWideRows = 1, kDotTallRows = 2, kDotTallVectors = 2;
constexpr int kRegisters = 16;
constexpr int kAttendRows = 4, kAttendVectors = 2;

typedef int32_t FourInts __attribute__((vector_size(16)));
typedef uint32_t FourBits __attribute__((vector_size(16)));
typedef float FourFloats __attribute__((vector_size(16)));

#if defined(__aarch64__)
static inline float32x4_t multiply_add(float32x4_t a, float32x4_t b, float32x4_t c) { return vfmaq_f32(c, a, b); }
#else
static inline FourFloats multiply_add(FourFloats a, FourFloats b, FourFloats c) { return a * b + c; }
#endif
static inline FourFloats load_bf16(const uint16_t* p) {
  const FourBits halves = {p[0], p[1], p[2], p[3]};
  return reinterpret_cast<FourFloats>(halves << 16);
}
static inline FourInts load_bytes(const uint8_t* p) { return FourInts{p[0], p[1], p[2], p[3]}; }
static inline FourInts load_signed_bytes(const uint8_t* p) {
  return FourInts{static_cast<int8_t>(p[0]), static_cast<int8_t>(p[1]), static_cast<int8_t>(p[2]),
                  static_cast<int8_t>(p[3])};
}
static inline uint32_t lane_bits(FourInts lanes) {
#if defined(__SSE2__) && !defined(MAX_KERNELS_PORTABLE)
  return _mm_movemask_ps(reinterpret_cast<__m128>(lanes));
#else
  return (lanes[0] & 1) | (lanes[1] & 2) | (lanes[2] & 4) | (lanes[3] & 8);
#endif
}
static inline void store_lanes(float* p, FourFloats v, uint32_t bits) {
  for (; bits != 0; bits &= bits - 1) *p++ = v[__builtin_ctz(bits)];
}

#include "vector.h"
#include "float16.h"
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

}  // namespace baseline

const Kernels kBaselineKernels = {
    "baseline",
    baseline::matmul_panel_f32,
    baseline::matmul_panel_bf16,
    {baseline::matmul_panel_quantized<baseline::Q8Format>, baseline::matmul_panel_quantized<baseline::Q4Format>,
     baseline::matmul_panel_quantized<baseline::Q4KFormat>, baseline::matmul_panel_quantized<baseline::Q6KFormat>},
    nullptr,
    {baseline::kDotWideRows, baseline::kDotTallRows},
    baseline::quantize_inputs,
    baseline::quantize_block,
    baseline::write_tokens,
    baseline::attend,
    baseline::attend_segment,
    baseline::merge_segments,
    baseline::argmax_row,
    baseline::sample_row,
    baseline::logprobs_row,
    baseline::norm_row,
    baseline::read_memory,
};

}  // namespace max_kernels
