// The kernels for AVX-512 with products of bfloat16; all but the bf16 matmul are those of isa_avx512.cpp, compiled anew.
#if defined(__x86_64__) && !defined(MAX_KERNELS_PORTABLE)
#include <immintrin.h>

#include <cstdint>

#include "isa.h"
#include "quantize.h"
#include "quantized_layout.h"
#include "target.h"
MAX_TARGET("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16")

namespace max_kernels {
namespace avx512_bf16 {

#include "avx512_vectors.h"
#include "vector.h"
#include "dot_vnni.h"
#include "tile.h"
#include "activation.h"
#include "matmul_panel.h"
#include "quantized_inputs.h"
#include "quantize_block.h"
#include "quantized_formats.h"
#include "matmul_quantized.h"
#include "attention_pages.h"
#include "attention_blocks.h"
#include "attention_tile.h"
#include "argmax_row.h"
#include "top_values.h"
#include "sample_row.h"
#include "logprobs_row.h"
#include "norm_row.h"
#include "memory_read.h"

// x is in pairs of bfloat16, each as wide as a float: strides and inputs of the tile count pairs.
template <int Rows, int Vectors>
static void multiply_pairs(const TileShape& t, const uint16_t* w, int64_t w_stride) {
  Vec sum[Rows][Vectors];
  start(t, sum);
  InputRows<Rows> x(t);
  for (int64_t k = 0; k < t.num_inputs; ++k, w += w_stride, x.advance(1)) {
    __m512bh weights[Vectors];
    for (int v = 0; v < Vectors; ++v) weights[v] = (__m512bh)_mm512_loadu_si512(w + v * 2 * kLanes);
    prefetch<Vectors>(w);
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
      int32_t pair;
      __builtin_memcpy(&pair, x.row(r), sizeof pair);
      const __m512bh input = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 16
      for (int v = 0; v < Vectors; ++v) sum[r][v] = _mm512_dpbf16_ps(sum[r][v], weights[v], input);
    }
  }
  finish(t, sum);
}

template <int Vectors, class Rows>
struct PairTiles;
template <int Vectors, int... R>
struct PairTiles<Vectors, Indices<R...>> {
  static constexpr Multiply<uint16_t> table[] = {multiply_pairs<R + 1, Vectors>...};
};

struct PairsPanel {
  using Weight = uint16_t;
  static constexpr int64_t kElements = 2;
  static constexpr int64_t kWide = kWideRows, kTall = kTallRows;
  static Multiply<uint16_t> wide(int64_t rows) {
    return PairTiles<kPanelVectors, MakeIndices<kWideRows>::type>::table[rows - 1];
  }
  static Multiply<uint16_t> tall(int64_t rows) {
    return PairTiles<kTallVectors, MakeIndices<kTallRows>::type>::table[rows - 1];
  }
};

static void matmul_panel_bf16(const Matmul& call, const MatmulInputs& inputs, int64_t panel, int64_t begin, int64_t end) {
  const int64_t pairs = (call.num_inputs + 1) / 2;
  multiply_panel<PairsPanel>(call, static_cast<const float*>(inputs.rows), inputs.stride, pairs, panel, begin, end);
}

static void convert_inputs(const float* x, int64_t count, uint16_t* converted) {
  const int64_t padded = count + count % 2;
  for (int64_t k = 0; k < padded; k += 16) {
    const int64_t left = count - k, left_padded = padded - k;
    const __mmask16 given = left >= 16 ? 0xffff : (__mmask16)((1u << left) - 1);
    const __mmask16 wanted = left_padded >= 16 ? 0xffff : (__mmask16)((1u << left_padded) - 1);
    const __m256bh rounded = _mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(given, x + k));
    _mm256_mask_storeu_epi16(converted + k, wanted, (__m256i)rounded);
  }
}

}  // namespace avx512_bf16

const Kernels kAvx512Bf16Kernels = {
    "avx512_bf16",
    avx512_bf16::matmul_panel_f32,
    avx512_bf16::matmul_panel_bf16,
    {avx512_bf16::matmul_panel_quantized<avx512_bf16::Q8Format>, avx512_bf16::matmul_panel_quantized<avx512_bf16::Q4Format>,
     avx512_bf16::matmul_panel_quantized<avx512_bf16::Q4KFormat>, avx512_bf16::matmul_panel_quantized<avx512_bf16::Q6KFormat>},
    avx512_bf16::convert_inputs,
    {avx512_bf16::kDotWideRows, avx512_bf16::kDotTallRows},
    avx512_bf16::quantize_inputs,
    avx512_bf16::quantize_block,
    avx512_bf16::write_tokens,
    avx512_bf16::attend,
    avx512_bf16::attend_segment,
    avx512_bf16::merge_segments,
    avx512_bf16::argmax_row,
    avx512_bf16::sample_row,
    avx512_bf16::logprobs_row,
    avx512_bf16::norm_row,
    avx512_bf16::read_memory,
};

}  // namespace max_kernels
MAX_TARGET_END
#endif
