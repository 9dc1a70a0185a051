// Norms of rows, which are shared out to the threads a few at a time: a row takes less than waking a thread does.
#include <algorithm>

#include "isa.h"
#include "thread_pool.h"

namespace max_kernels {

std::string rms_norm(const RmsNorm& call) {
  if (call.width < 1) return "a norm needs columns";
  if ((call.delta == nullptr) != (call.sum == nullptr)) return "a norm keeps a sum where it adds one";
  if (kernels() == nullptr) return "MAX_KERNELS_ISA names an instruction set that this CPU lacks";
  const Kernels& isa = *kernels();
  constexpr int64_t kRows = 16;
  parallel_for((call.num_rows + kRows - 1) / kRows, [&](int64_t chunk) {
    const int64_t end = std::min(call.num_rows, (chunk + 1) * kRows);
    for (int64_t row = chunk * kRows; row < end; ++row) isa.norm_row(call, row);
  });
  return "";
}

}  // namespace max_kernels
