// What is taken from logits: tokens, greedy or drawn, and log probabilities. Rows are shared out to the threads.
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

namespace {

uint32_t rotate_left(uint32_t x, int distance) { return x << distance | x >> (32 - distance); }

// The first word of Threefry-2x32 with 20 rounds (Salmon et al., SC 2011) at counter (position, 0), as 24 bits of [0, 1).
double uniform(const SampleNumbers& row) {
  const uint32_t keys[3] = {row.seed[0], row.seed[1], row.seed[0] ^ row.seed[1] ^ 0x1BD11BDAu};
  constexpr int kDistances[2][4] = {{13, 15, 26, 6}, {17, 29, 16, 24}};
  uint32_t x0 = static_cast<uint32_t>(row.position) + keys[0], x1 = keys[1];
  for (uint32_t group = 0; group < 5; ++group) {
    for (int distance : kDistances[group % 2]) {
      x0 += x1;
      x1 = rotate_left(x1, distance) ^ x0;
    }
    x0 += keys[(group + 1) % 3];
    x1 += keys[(group + 2) % 3] + group + 1;
  }
  return static_cast<double>(x0 >> 8) * 0x1p-24;
}

}  // namespace

int64_t sample_scratch(const Sampling& call) {
  constexpr int64_t kArrays = 5, kWidestVector = 16;
  return kArrays * (call.num_columns + 2 * kWidestVector);
}

std::string sample(const Sampling& call) {
  if (std::string wrong = problem_of_rows(call.num_columns); !wrong.empty()) return wrong;
  for (int64_t row = 0; row < call.num_rows; ++row) {
    if (call.numbers[row].adjusted >= call.num_adjusted) {
      return "the adjusted row of row " + std::to_string(row) + " is out of range";
    }
  }
  const Kernels& isa = *kernels();
  parallel_for(call.num_rows, [&](int64_t row) {
    static thread_local Scratch scratch;
    float* memory = static_cast<float*>(scratch.at_least(sample_scratch(call) * sizeof(float)));
    call.ids[row] = isa.sample_row(call, row, uniform(call.numbers[row]), memory);
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
    if (call.ids[row] < -1 || call.ids[row] >= call.num_columns) {
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
