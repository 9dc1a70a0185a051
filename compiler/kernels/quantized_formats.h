// The formats of quantized weights as vectors of codes and scales. Included as vector.h is; needs load_f16(), load_bytes()
// and load_signed_bytes().

MAX_INLINE Bits bytes_at(const uint8_t* p) { return reinterpret_cast<Bits>(load_bytes(p)); }
MAX_INLINE Bits signed_bytes_at(const uint8_t* p) { return reinterpret_cast<Bits>(load_signed_bytes(p)); }

// Where a block of 32 inputs lies in a panel, its codes step by step, and its scales by column.
struct Q8Format {
  static constexpr int kLargest = 128, kGroups = 1;
  static constexpr bool kHasMinimum = false;
  static constexpr int64_t kBytes = kQ8Bytes, kPackedBytes = kBytes;
  static constexpr int kFewRows = 12;
  const uint8_t* at;
  MAX_INLINE Q8Format of(const uint8_t* panel, int64_t block) { return {panel + block * kQ8Bytes}; }
  MAX_MEMBER Bits codes(int64_t step, int64_t column) const {
    return load_bits(at + kScaleBytes + step * kStepBytes + column * kStepInputs);
  }
  MAX_MEMBER Vec scale(int, int64_t column) const { return load_f16(reinterpret_cast<const uint16_t*>(at) + column); }
  MAX_MEMBER Vec minimum(int64_t) const { return Vec{}; }
};

MAX_INLINE Bits load_nibbles(const uint8_t* codes, int64_t step, int64_t column) {
  const Bits both = load_bits(codes + step / 2 * kStepBytes + column * kStepInputs);
  return (step % 2 == 0 ? both : both >> 4) & 0x0f0f0f0f;
}

struct Q4Format {
  static constexpr int kLargest = 15, kGroups = 1;
  static constexpr bool kHasMinimum = false;
  static constexpr int64_t kBytes = kQ4Bytes, kPackedBytes = kBytes;
  static constexpr int kFewRows = 12;
  const uint8_t* at;
  MAX_INLINE Q4Format of(const uint8_t* panel, int64_t block) { return {panel + block * kQ4Bytes}; }
  MAX_MEMBER Bits codes(int64_t step, int64_t column) const { return load_nibbles(at + kScaleBytes, step, column); }
  MAX_MEMBER Vec scale(int, int64_t column) const { return load_f16(reinterpret_cast<const uint16_t*>(at) + column); }
  MAX_MEMBER Vec minimum(int64_t) const { return Vec{}; }
};

struct Q4KFormat {
  static constexpr int kLargest = 15, kGroups = 1;
  static constexpr bool kHasMinimum = true;
  static constexpr int64_t kBytes = kQ4KBytes / kSuperBlocks, kPackedBytes = kBytes;
  static constexpr int kFewRows = 7;
  const uint8_t* header;
  int64_t block;  // of the 8 behind it
  MAX_INLINE Q4KFormat of(const uint8_t* panel, int64_t block) {
    return {panel + block / kSuperBlocks * kQ4KBytes, block % kSuperBlocks};
  }
  MAX_MEMBER Bits codes(int64_t step, int64_t column) const {
    return load_nibbles(header + kQ4KHeaderBytes + block * kNibbleBytes, step, column);
  }
  MAX_MEMBER const uint8_t* scales() const { return header + 2 * kScaleBytes; }
  MAX_MEMBER Vec scale(int, int64_t column) const {
    const Bits scale = bytes_at(scales() + block * kPanelColumns + column) & 63;
    return load_f16(reinterpret_cast<const uint16_t*>(header) + column) * __builtin_convertvector(scale, Vec);
  }
  MAX_MEMBER Vec minimum(int64_t column) const {
    const Bits upper = bytes_at(scales() + block * kPanelColumns + column) >> 6;
    const Bits lower = bytes_at(scales() + (kSuperBlocks + block / 2) * kPanelColumns + column);
    const Bits minimum = (upper << 4) | (lower >> static_cast<int>(block % 2 * 4) & 15);
    return load_f16(reinterpret_cast<const uint16_t*>(header + kScaleBytes) + column) *
           __builtin_convertvector(minimum, Vec);
  }
};

struct Q6KFormat {
  static constexpr int kLargest = 63, kGroups = 2;
  static constexpr bool kHasMinimum = false;
  static constexpr int64_t kBytes = kQ6KBytes / kSuperBlocks, kPackedBytes = kBytes;
  static constexpr int kFewRows = 7;
  const uint8_t* header;
  int64_t block;
  MAX_INLINE Q6KFormat of(const uint8_t* panel, int64_t block) {
    return {panel + block / kSuperBlocks * kQ6KBytes, block % kSuperBlocks};
  }
  MAX_MEMBER Bits codes(int64_t step, int64_t column) const {
    const uint8_t* at = header + kQ6KHeaderBytes + block * kQ6KBlockBytes;
    const Bits upper = load_bits(at + kNibbleBytes + step / 4 * kStepBytes + column * kStepInputs);
    const Bits placed = step % 4 == 0 ? upper << 4 : step % 4 == 1 ? upper << 2 : step % 4 == 2 ? upper : upper >> 2;
    return load_nibbles(at, step, column) | (placed & 0x30303030);
  }
  MAX_MEMBER Vec scale(int group, int64_t column) const {
    const uint8_t* scales = header + kScaleBytes + (2 * block + group) * kPanelColumns;
    const Vec scale = __builtin_convertvector(signed_bytes_at(scales + column), Vec);
    return load_f16(reinterpret_cast<const uint16_t*>(header) + column) * scale;
  }
  MAX_MEMBER Vec minimum(int64_t) const { return Vec{}; }
};

// A block of another format with its codes as bytes and its scales as floats: what many rows are multiplied with.
template <class Format>
struct Unpacked {
  static constexpr int kLargest = Format::kLargest, kGroups = Format::kGroups;
  static constexpr bool kHasMinimum = Format::kHasMinimum;
  static constexpr int64_t kPackedBytes = Format::kBytes;
  static constexpr int64_t kScales = (kGroups + kHasMinimum) * kPanelColumns;
  static constexpr int64_t kBytes = kScales * 4 + kBlockInputs * kPanelColumns;
  uint8_t* at;
  MAX_INLINE Unpacked of(const uint8_t* memory, int64_t block) {
    return {const_cast<uint8_t*>(memory) + block * kBytes};
  }
  MAX_MEMBER float* scales() const { return reinterpret_cast<float*>(at); }
  MAX_MEMBER Bits codes(int64_t step, int64_t column) const {
    return load_bits(at + kScales * 4 + step * kStepBytes + column * kStepInputs);
  }
  MAX_MEMBER Vec scale(int group, int64_t column) const { return load(scales() + group * kPanelColumns + column); }
  MAX_MEMBER Vec minimum(int64_t column) const { return load(scales() + kGroups * kPanelColumns + column); }

  MAX_MEMBER void fill(const Format& block) const {
    for (int64_t column = 0; column < kPanelColumns; column += kLanes) {
      for (int group = 0; group < kGroups; ++group)
        store(scales() + group * kPanelColumns + column, block.scale(group, column));
      if (kHasMinimum) store(scales() + kGroups * kPanelColumns + column, block.minimum(column));
#pragma GCC unroll 8
      for (int64_t step = 0; step < kBlockSteps; ++step)
        store_bits(at + kScales * 4 + step * kStepBytes + column * kStepInputs, block.codes(step, column));
    }
  }
};
