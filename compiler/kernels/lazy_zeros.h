// Zeros that take memory when they are written.
#pragma once

#include <cstdint>

namespace max_kernels {

// Makes private anonymous memory, as allocators give it, read as zeros, and gives back what it took.
void make_lazy_zeros(void* memory, int64_t bytes);

}  // namespace max_kernels
