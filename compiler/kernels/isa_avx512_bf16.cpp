// The kernels for AVX-512 with products of bfloat16: a matmul and attention of their own for it, the rest is that of
// isa_avx512.cpp, compiled anew.
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
#include "matmul_pairs.h"
#include "attention_pages.h"
#include "attention_blocks.h"
#include "attention_pairs.h"
#include "attention_tile.h"
#include "argmax_row.h"
#include "top_values.h"
#include "sample_row.h"
#include "logprobs_row.h"
#include "norm_row.h"
#include "memory_read.h"

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
