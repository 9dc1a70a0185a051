// Greedy sampling: XLA's argmax on CPUs compares one value at a time.
#include <limits>

#include "isa.h"
#include "thread_pool.h"

namespace max_kernels {

std::string argmax(const float* x, int64_t num_rows, int64_t num_columns, int32_t* result) {
  if (num_columns < 1 || num_columns > std::numeric_limits<int32_t>::max()) return "argmax needs 1 to 2**31 - 1 columns";
  if (kernels() == nullptr) return "MAX_KERNELS_ISA names an instruction set that this CPU lacks";
  const Kernels& isa = *kernels();
  parallel_for(num_rows, [&](int64_t row) {
    result[row] = static_cast<int32_t>(isa.argmax_row(x + row * num_columns, num_columns));
  });
  return "";
}

}  // namespace max_kernels
