// What is taken from logits: greedy tokens and log probabilities. Rows are shared out to the threads.
#include <limits>

#include "isa.h"
#include "scratch.h"
#include "thread_pool.h"

namespace max_kernels {

namespace {

std::string problem_of_rows(int64_t num_columns) {
  if (num_columns < 1 || num_columns > std::numeric_limits<int32_t>::max()) return "rows have 1 to 2**31 - 1 columns";
  if (kernels() == nullptr) return "MAX_KERNELS_ISA names an instruction set that this CPU lacks";
  return "";
}

}  // namespace

std::string argmax(const float* x, int64_t num_rows, int64_t num_columns, int32_t* result) {
  if (std::string wrong = problem_of_rows(num_columns); !wrong.empty()) return wrong;
  const Kernels& isa = *kernels();
  parallel_for(num_rows, [&](int64_t row) {
    result[row] = static_cast<int32_t>(isa.argmax_row(x + row * num_columns, num_columns));
  });
  return "";
}

int64_t logprobs_scratch(const Logprobs& call) {
  constexpr int64_t kWidestVector = 16;
  return 4 * call.num_columns + 2 * kWidestVector;
}

std::string logprobs(const Logprobs& call) {
  if (std::string wrong = problem_of_rows(call.num_columns); !wrong.empty()) return wrong;
  if (call.num_top < 1 || call.num_top > call.num_columns) return "a row has no so many highest values";
  for (int64_t row = 0; row < call.num_rows; ++row) {
    if (call.ids[row] < 0 || call.ids[row] >= call.num_columns) {
      return "the id of row " + std::to_string(row) + " is out of range";
    }
  }
  const Kernels& isa = *kernels();
  parallel_for(call.num_rows, [&](int64_t row) {
    static thread_local Scratch scratch;
    isa.logprobs_row(call, row, static_cast<float*>(scratch.at_least(logprobs_scratch(call) * sizeof(float))));
  });
  return "";
}

}  // namespace max_kernels
