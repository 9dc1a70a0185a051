// Arguments as XLA's handlers take them, and those that several handlers read alike.
#pragma once

#include <string>
#include <utility>

#include "kernels.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace max_kernels {

using F32Buffer = ffi::Buffer<ffi::F32>;
using F32Matrix = ffi::Buffer<ffi::F32, 2>;
using F32Vector = ffi::Buffer<ffi::F32, 1>;
using Bytes = ffi::Buffer<ffi::U8>;
using IndexVector = ffi::Buffer<ffi::S32, 1>;
using Table = ffi::Buffer<ffi::S32, 2>;

inline ffi::Error reported(const std::string& problem) {
  return problem.empty() ? ffi::Error::Success() : ffi::Error::InvalidArgument(problem);
}

// A handler's arguments so far, and those of a step behind them.
template <class Binding>
auto with_step(Binding&& so_far) {
  return std::forward<Binding>(so_far)
      .template Arg<F32Matrix>()     // cos (T, rotary_dim / 2)
      .template Arg<F32Matrix>()     // sin
      .template Arg<Table>()         // page_table (rows, max_pages)
      .template Arg<IndexVector>()   // rows (T,)
      .template Arg<IndexVector>()   // positions (T,)
      .template Arg<IndexVector>();  // slots (T,)
}

// What attention takes of a step, and the pages of a layer.
struct StepBuffers {
  ffi::AnyBuffer pages;
  F32Matrix cos, sin;
  Table page_table;
  IndexVector rows, positions, slots;
};

// Fills in what follows from these buffers: not the queries, the output and how scores are made. Returns what is wrong.
inline std::string describe(const StepBuffers& given, Attention* call) {
  const auto dims = given.pages.dimensions();
  const int64_t tokens = given.rows.dimensions()[0];
  call->pages_are_bf16 = given.pages.element_type() == ffi::BF16;
  if (dims.size() != 5 || dims[1] != 2) return "pages are not (P, 2, K, page_tokens, H)";
  if (!call->pages_are_bf16 && given.pages.element_type() != ffi::F32) return "pages are neither float32 nor bfloat16";
  const bool fits = given.cos.dimensions()[0] == tokens && given.sin.dimensions()[0] == tokens &&
                    given.cos.dimensions()[1] == given.sin.dimensions()[1] &&
                    given.positions.dimensions()[0] == tokens && given.slots.dimensions()[0] == tokens;
  if (!fits) return "the arguments of the attention do not fit each other";
  call->cos = given.cos.typed_data();
  call->sin = given.sin.typed_data();
  call->page_table = given.page_table.typed_data();
  call->rows = given.rows.typed_data();
  call->positions = given.positions.typed_data();
  call->slots = given.slots.typed_data();
  call->num_tokens = tokens;
  call->num_kv_heads = dims[2];
  call->head_dim = dims[4];
  call->rotary_dim = 2 * given.cos.dimensions()[1];
  call->num_pages = dims[0];
  call->page_tokens = dims[3];
  call->max_rows = given.page_table.dimensions()[0];
  call->max_pages = given.page_table.dimensions()[1];
  return "";
}

}  // namespace max_kernels
