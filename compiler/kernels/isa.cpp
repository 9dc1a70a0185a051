// Chooses the instruction set once per process.
#include "isa.h"

#include <atomic>
#include <cstdlib>

#if defined(__x86_64__) && !defined(MAX_KERNELS_PORTABLE)
#include <cpuid.h>
#endif

namespace max_kernels {
namespace {

#if defined(__x86_64__) && !defined(MAX_KERNELS_PORTABLE)
// The feature has no name for __builtin_cpu_supports in clang 14.
bool supports_f16c() {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
}
#endif

struct Choice {
  const Kernels* kernels;
  bool supported;
};

// Best last.
constexpr int kMaxChoices = 5;
int choices(Choice (&found)[kMaxChoices]) {
  int count = 0;
  found[count++] = {&kBaselineKernels, true};
#if defined(__x86_64__) && !defined(MAX_KERNELS_PORTABLE)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && supports_f16c();
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  found[count++] = {&kAvx2Kernels, avx2};
  found[count++] = {&kAvx512Kernels, avx512};
  const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
  found[count++] = {&kAvx512VnniKernels, vnni};
  found[count++] = {&kAvx512Bf16Kernels, vnni && __builtin_cpu_supports("avx512bf16")};
#endif
  return count;
}

std::atomic<const Kernels*> chosen{nullptr};

}  // namespace

bool isa_is_supported(const std::string& name) {
  Choice found[kMaxChoices];
  for (int i = choices(found) - 1; i >= 0; --i) {
    if (name == found[i].kernels->name) return found[i].supported;
  }
  return false;
}

std::string select_isa(const std::string& name) {
  std::string wanted = name;
  const char* forced = std::getenv("MAX_KERNELS_ISA");
  if (wanted.empty() && forced != nullptr) wanted = forced;
  Choice found[kMaxChoices];
  for (int i = choices(found) - 1; i >= 0; --i) {
    if (!found[i].supported) continue;
    if (!wanted.empty() && wanted != found[i].kernels->name) continue;
    chosen.store(found[i].kernels);
    return "";
  }
  return "this CPU has no instruction set '" + wanted + "' for the kernels";
}

const Kernels* kernels() {
  if (chosen.load() == nullptr) select_isa("");
  return chosen.load();
}

}  // namespace max_kernels
