#include "hints.h"

#include <cstdlib>
#include <cstring>

#if defined(__x86_64__) && !defined(MAX_KERNELS_PORTABLE)
#include <cpuid.h>
#endif

namespace max_kernels {
namespace {

bool is_zen4() {
#if defined(__x86_64__) && !defined(MAX_KERNELS_PORTABLE)
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (!__get_cpuid(0, &eax, &ebx, &ecx, &edx)) return false;
  if (ebx != signature_AMD_ebx || ecx != signature_AMD_ecx || edx != signature_AMD_edx) return false;
  if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx)) return false;
  const unsigned family = ((eax >> 8) & 15) + ((eax >> 20) & 255);
  const unsigned upper_model = (eax >> 16) & 15;  // 1 Genoa, 6 Raphael, 7 Phoenix, 10 Bergamo
  return family == 0x19 && (upper_model == 1 || upper_model == 6 || upper_model == 7 || upper_model == 10);
#else
  return false;
#endif
}

// Measured on one thread of a Zen 4, ms for the matmuls of 349 M weights. None is best while the work on a line is short,
// the second cache when it is long:
//               rows   none   first cache   second cache
//   float32        4   45.0          52.9           60.8
//   float32        8   59.5          59.5           49.7
//   bfloat16       4   23.2          25.4           29.1
//   q8_0           1   12.2          14.4           15.5
//   q8_0           8   22.8          19.2           16.6
//   q4_0           2    6.1           7.0            7.6
//   q4_0           4   11.4           9.1            7.9
//   q4_k           1   17.1           7.0            7.5
//   q4_k           2   18.2           7.6            6.2
//   q6_k           1   21.9           9.5           11.1
//   q6_k           7   39.3          17.8           16.8
Hints hints_of_zen4(Encoding encoding, int64_t num_rows) {
  switch (encoding) {
    case Encoding::kF32:
    case Encoding::kBf16:
      return num_rows <= 4 ? Hints::kNone : Hints::kSecondCache;
    case Encoding::kQ8_0:
      return num_rows <= 3 ? Hints::kNone : Hints::kSecondCache;
    case Encoding::kQ4_0:
      return num_rows <= 2 ? Hints::kNone : Hints::kSecondCache;
    default:
      return num_rows == 1 ? Hints::kFirstCache : Hints::kSecondCache;
  }
}

enum class Policy { kNone, kFirstCache, kSecondCache, kZen4 };

// MAX_KERNELS_HINTS forces one kind for everything: "none", "first" or "second" cache.
Policy policy() {
  const char* forced = std::getenv("MAX_KERNELS_HINTS");
  if (forced != nullptr && std::strcmp(forced, "none") == 0) return Policy::kNone;
  if (forced != nullptr && std::strcmp(forced, "first") == 0) return Policy::kFirstCache;
  if (forced != nullptr && std::strcmp(forced, "second") == 0) return Policy::kSecondCache;
  // Others as a Zen 5 likes it: float32 with 12 rows reads 20 GB/s without hints, 34 with them.
  return is_zen4() ? Policy::kZen4 : Policy::kFirstCache;
}

}  // namespace

Hints hints_for(Encoding encoding, int64_t num_rows) {
  static const Policy chosen = policy();
  switch (chosen) {
    case Policy::kNone:
      return Hints::kNone;
    case Policy::kSecondCache:
      return Hints::kSecondCache;
    case Policy::kZen4:
      return hints_of_zen4(encoding, num_rows);
    default:
      return Hints::kFirstCache;
  }
}

}  // namespace max_kernels
