// The kernels for AVX-512 with integer products (VNNI); all but those of quantized weights are those of isa_avx512.cpp.
#if defined(__x86_64__) && !defined(MAX_KERNELS_PORTABLE)
#include <immintrin.h>

#include <cstdint>

#include "isa.h"
#include "quantize.h"
#include "quantized_layout.h"
#include "target.h"
MAX_TARGET("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")

namespace max_kernels {
namespace avx512_vnni {

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

}  // namespace avx512_vnni

const Kernels kAvx512VnniKernels = {
    "avx512_vnni",
    avx512_vnni::matmul_panel_f32,
    avx512_vnni::matmul_panel_bf16,
    {avx512_vnni::matmul_panel_quantized<avx512_vnni::Q8Format>, avx512_vnni::matmul_panel_quantized<avx512_vnni::Q4Format>,
     avx512_vnni::matmul_panel_quantized<avx512_vnni::Q4KFormat>, avx512_vnni::matmul_panel_quantized<avx512_vnni::Q6KFormat>},
    nullptr,
    {avx512_vnni::kDotWideRows, avx512_vnni::kDotTallRows},
    avx512_vnni::quantize_inputs,
    avx512_vnni::quantize_block,
    avx512_vnni::write_tokens,
    avx512_vnni::attend,
    avx512_vnni::attend_segment,
    avx512_vnni::merge_segments,
    avx512_vnni::argmax_row,
    avx512_vnni::sample_row,
    avx512_vnni::logprobs_row,
    avx512_vnni::norm_row,
    avx512_vnni::read_memory,
};

}  // namespace max_kernels
MAX_TARGET_END
#endif
