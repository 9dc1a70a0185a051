// The parts of GGUF's blocks that are made of codes and scales; quantize_block.h finds both.
#include "quantize.h"

#include <cmath>
#include <cstring>

#include "isa.h"
#include "quantized_layout.h"

namespace max_kernels {
namespace {

void put_f16(uint8_t* to, uint16_t value) { std::memcpy(to, &value, sizeof value); }

}  // namespace

uint16_t round_to_f16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t sign = bits >> 16 & 0x8000;
  bits &= 0x7fffffff;
  if (bits < (uint32_t{113} << 23)) {  // below 2**-14 the last bit stands for 2**-24
    return static_cast<uint16_t>(sign | static_cast<uint32_t>(std::nearbyint(std::fabs(value) * 0x1p24f)));
  }
  if (bits > (uint32_t{255} << 23)) return static_cast<uint16_t>(sign | 0x7e00);
  if (bits >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);  // from 65520
  bits -= uint32_t{112} << 23;
  return static_cast<uint16_t>(sign | ((bits + 0xfff + ((bits >> 13) & 1)) >> 13));
}

float widen_f16(uint16_t half) {
  const int exponent = half >> 10 & 31, fraction = half & 0x3ff;
  if (exponent == 31) return fraction ? NAN : half & 0x8000 ? -INFINITY : INFINITY;
  const float magnitude = exponent == 0 ? std::ldexp(static_cast<float>(fraction), -24)
                                        : std::ldexp(static_cast<float>(fraction | 0x400), exponent - 25);
  return half & 0x8000 ? -magnitude : magnitude;
}

uint16_t unit_of_6_bits(float largest) {
  const uint16_t nearest = round_to_f16(largest / 63);
  return static_cast<uint16_t>(63 * widen_f16(nearest) < largest ? nearest + 1 : nearest);
}

void write_q8_0(uint16_t scale, const uint8_t* codes, uint8_t* gguf) {
  put_f16(gguf, scale);
  std::memcpy(gguf + 2, codes, 32);
}

void write_q4_0(uint16_t scale, const uint8_t* codes, uint8_t* gguf) {
  put_f16(gguf, scale);
  for (int k = 0; k < 16; ++k) gguf[2 + k] = static_cast<uint8_t>(codes[k] | (codes[16 + k] << 4));
}

void write_q4_k(uint16_t scale, uint16_t minimum, const uint8_t* scales, const uint8_t* minima, const uint8_t* codes,
                uint8_t* gguf) {
  put_f16(gguf, scale);
  put_f16(gguf + 2, minimum);
  for (int i = 0; i < 4; ++i) {
    gguf[4 + i] = static_cast<uint8_t>(scales[i] | (scales[4 + i] >> 4 << 6));
    gguf[8 + i] = static_cast<uint8_t>(minima[i] | (minima[4 + i] >> 4 << 6));
    gguf[12 + i] = static_cast<uint8_t>((scales[4 + i] & 15) | (minima[4 + i] << 4));
  }
  for (int i = 0; i < 128; ++i) {
    const int at = i / 32 * 64 + i % 32;
    gguf[16 + i] = static_cast<uint8_t>(codes[at] | (codes[at + 32] << 4));
  }
}

void write_q6_k(uint16_t scale, const int8_t* scales, const uint8_t* codes, uint8_t* gguf) {
  std::memcpy(gguf + 192, scales, 16);
  put_f16(gguf + 208, scale);
  for (int i = 0; i < 128; ++i) {
    const int at = i / 64 * 128 + i % 64;
    gguf[i] = static_cast<uint8_t>((codes[at] & 15) | (codes[at + 64] << 4));
  }
  for (int i = 0; i < 64; ++i) {
    const uint8_t* first = codes + i / 32 * 128 + i % 32;
    gguf[128 + i] = static_cast<uint8_t>(first[0] >> 4 | first[32] >> 4 << 2 | first[64] >> 4 << 4 | first[96] >> 4 << 6);
  }
}

void quantize_block(Encoding encoding, const float* elements, uint8_t* gguf) {
  kernels()->quantize_block(encoding, elements, gguf);
}

}  // namespace max_kernels
