// A plain read of memory, the bound that the matmuls are measured against. Included as vector.h is.

static uint32_t read_memory(const void* memory, int64_t bytes) {
  constexpr int64_t kVectors = 8;
  Bits sums[kVectors] = {};
  const char* p = static_cast<const char*>(memory);
  for (const char* end = p + bytes; p + sizeof sums <= end; p += sizeof sums) {
    for (int64_t v = 0; v < kVectors; ++v) {
      Bits bits;
      __builtin_memcpy(&bits, p + v * sizeof bits, sizeof bits);
      sums[v] ^= bits;
    }
  }
  for (int64_t v = 1; v < kVectors; ++v) sums[0] ^= sums[v];
  uint32_t sum = 0;
  for (int i = 0; i < kLanes; ++i) sum ^= static_cast<uint32_t>(sums[0][i]);
  return sum;
}
