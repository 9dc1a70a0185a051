// The kernels for AVX-512 (F, BW, DQ, VL).
#if defined(__x86_64__) && !defined(MAX_KERNELS_PORTABLE)
#include <immintrin.h>

#include <cstdint>

#include "isa.h"
#include "quantize.h"
#include "quantized_layout.h"
#include "target.h"
MAX_TARGET("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")

namespace max_kernels {
namespace avx512 {

#include "avx512_vectors.h"
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

}  // namespace avx512

const Kernels kAvx512Kernels = {
    "avx512",
    avx512::matmul_panel_f32,
    avx512::matmul_panel_bf16,
    {avx512::matmul_panel_quantized<avx512::Q8Format>, avx512::matmul_panel_quantized<avx512::Q4Format>,
     avx512::matmul_panel_quantized<avx512::Q4KFormat>, avx512::matmul_panel_quantized<avx512::Q6KFormat>},
    nullptr,
    {avx512::kDotWideRows, avx512::kDotTallRows},
    avx512::quantize_inputs,
    avx512::quantize_block,
    avx512::write_tokens,
    avx512::attend,
    avx512::attend_segment,
    avx512::merge_segments,
    avx512::argmax_row,
    avx512::sample_row,
    avx512::logprobs_row,
    avx512::norm_row,
    avx512::read_memory,
};

}  // namespace max_kernels
MAX_TARGET_END
#endif
