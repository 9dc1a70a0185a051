// Where a matmul asks for the weights that it will read next, a hint per cache line, kHintBytes ahead.
#pragma once

#include "kernels.h"

namespace max_kernels {

enum class Hints : int { kNone, kFirstCache, kSecondCache };

constexpr int64_t kHintBytes = 8192;

// What serves this CPU best while so many rows take weights of the encoding from memory; bits do not depend on it.
Hints hints_for(Encoding encoding, int64_t num_rows);

}  // namespace max_kernels
