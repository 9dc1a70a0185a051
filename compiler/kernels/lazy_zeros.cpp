// Zeros that take memory when they are written: a pool of pages is much larger than what most requests use of it.
#include "lazy_zeros.h"

#include <cstring>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace max_kernels {

void make_lazy_zeros(void* memory, int64_t bytes) {
  char* const begin = static_cast<char*>(memory);
  char* const end = begin + bytes;
#if defined(__linux__)
  const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  char* const first = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(begin) + page - 1) / page * page);
  char* const last = reinterpret_cast<char*>(reinterpret_cast<uintptr_t>(end) / page * page);
  // What the allocator gives is private: whole pages that are given back read as zeros from then on.
  if (first < last && madvise(first, last - first, MADV_DONTNEED) == 0) {
    madvise(first, last - first, MADV_HUGEPAGE);  // decoding reads them twice as fast; refused where there are none
    std::memset(begin, 0, first - begin);
    std::memset(last, 0, end - last);
    return;
  }
#endif
  std::memset(begin, 0, end - begin);
}

}  // namespace max_kernels
