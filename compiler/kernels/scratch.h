// Memory that a thread keeps from call to call, so that a step allocates nothing once it is warm.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

namespace max_kernels {

class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(memory_); }

  // At least `bytes`, aligned to 64, with nothing certain in them.
  void* at_least(int64_t bytes) {
    if (bytes <= bytes_) return memory_;
    std::free(memory_);
    bytes_ = (bytes + 4095) / 4096 * 4096;
    memory_ = std::aligned_alloc(64, static_cast<std::size_t>(bytes_));
    if (memory_ == nullptr) throw std::bad_alloc();
    return memory_;
  }

 private:
  void* memory_ = nullptr;
  int64_t bytes_ = 0;
};

}  // namespace max_kernels
