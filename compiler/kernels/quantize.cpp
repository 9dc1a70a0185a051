// From floats to the blocks of GGUF's formats: q8_0 and q4_0 as GGUF's own quantizer, q4_k and q6_k by a search for the
// scales of least squared error.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "quantized_layout.h"

namespace max_kernels {
namespace {

// To nearest, ties to even; too large becomes infinite, and NaN stays NaN.
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
  const float magnitude = (half & 0x7c00) == 0 ? std::ldexp(static_cast<float>(half & 0x3ff), -24)
                                               : std::ldexp(static_cast<float>((half & 0x3ff) | 0x400), (half >> 10 & 31) - 25);
  return half & 0x8000 ? -magnitude : magnitude;
}

void put_f16(uint8_t* to, uint16_t value) { std::memcpy(to, &value, sizeof value); }

// The largest magnitude / 127 is the scale; halves go away from zero.
void quantize_q8_0(const float* x, uint8_t* gguf) {
  float largest = 0;
  for (int k = 0; k < 32; ++k) largest = std::max(largest, std::fabs(x[k]));
  const float unit = largest / 127, per_unit = unit == 0 ? 0 : 1 / unit;
  put_f16(gguf, round_to_f16(unit));
  for (int k = 0; k < 32; ++k) gguf[2 + k] = static_cast<uint8_t>(static_cast<int8_t>(std::round(x[k] * per_unit)));
}

// The element of largest magnitude becomes -8, so that the side on which it lies has one code more.
void quantize_q4_0(const float* x, uint8_t* gguf) {
  float extreme = 0;
  for (int k = 0; k < 32; ++k) extreme = std::fabs(x[k]) > std::fabs(extreme) ? x[k] : extreme;
  const float unit = extreme / -8, per_unit = unit == 0 ? 0 : 1 / unit;
  put_f16(gguf, round_to_f16(unit));
  uint8_t codes[32];
  for (int k = 0; k < 32; ++k) codes[k] = static_cast<uint8_t>(std::min(15.0f, std::trunc(x[k] * per_unit + 8.5f)));
  for (int k = 0; k < 16; ++k) gguf[2 + k] = static_cast<uint8_t>(codes[k] | (codes[16 + k] << 4));
}

// Codes 0 to 15 with x ~ scale * code + low, and the squared error of that.
float assign_codes(const float* x, float scale, float low, uint8_t* codes) {
  const float per_unit = scale == 0 ? 0 : 1 / scale;
  float error = 0;
  for (int k = 0; k < 32; ++k) {
    const float code = std::min(15.0f, std::max(0.0f, std::nearbyint((x[k] - low) * per_unit)));
    const float difference = x[k] - (scale * code + low);
    codes[k] = static_cast<uint8_t>(code);
    error += difference * difference;
  }
  return error;
}

// The scale and the low, at most 0, that fit given codes best.
void fit_line(const float* x, const uint8_t* codes, float& scale, float& low) {
  float sum_x = 0, sum_q = 0, sum_qq = 0, sum_xq = 0;
  for (int k = 0; k < 32; ++k) {
    const float q = codes[k];
    sum_x += x[k], sum_q += q, sum_qq += q * q, sum_xq += x[k] * q;
  }
  const float determinant = 32 * sum_qq - sum_q * sum_q;
  if (determinant <= 0) return;
  low = (sum_qq * sum_x - sum_q * sum_xq) / determinant;
  scale = (32 * sum_xq - sum_q * sum_x) / determinant;
  if (low > 0) low = 0, scale = sum_xq / sum_qq;
}

// A block's scale and low: from divisions of its range in about 15 steps the one that leaves the least squared error.
void search_line(const float* x, float& scale, float& low) {
  const float lowest = std::min(0.0f, *std::min_element(x, x + 32)), range = *std::max_element(x, x + 32) - lowest;
  scale = 0, low = lowest;
  if (!(range > 0)) return;
  float least = INFINITY;
  for (int tenths = 135; tenths <= 165; ++tenths) {
    float tried_scale = range / (0.1f * static_cast<float>(tenths)), tried_low = lowest;
    uint8_t codes[32];
    assign_codes(x, tried_scale, tried_low, codes);
    fit_line(x, codes, tried_scale, tried_low);
    const float error = assign_codes(x, tried_scale, tried_low, codes);
    if (error < least) least = error, scale = tried_scale, low = tried_low;
  }
}

// Of the 6-bit scale and minimum nearest to what was sought and their neighbours, those of least squared error.
void settle_line(const float* x, float unit, float minimum_unit, float scale, float low, uint8_t (&chosen)[2],
                 uint8_t* codes) {
  const int near_scale = unit == 0 ? 0 : static_cast<int>(std::nearbyint(scale / unit));
  const int near_low = minimum_unit == 0 ? 0 : static_cast<int>(std::nearbyint(-low / minimum_unit));
  float least = INFINITY;
  chosen[0] = chosen[1] = 0;
  std::memset(codes, 0, 32);
  for (int s = std::max(0, near_scale - 1); s <= std::min(63, near_scale + 1); ++s) {
    for (int m = std::max(0, near_low - 1); m <= std::min(63, near_low + 1); ++m) {
      uint8_t tried[32];
      const float error = assign_codes(x, unit * static_cast<float>(s), -minimum_unit * static_cast<float>(m), tried);
      if (!(error < least)) continue;
      least = error, chosen[0] = static_cast<uint8_t>(s), chosen[1] = static_cast<uint8_t>(m);
      std::memcpy(codes, tried, sizeof tried);
    }
  }
}

// Of which 63 reach the largest: among the small float16 the nearest one would fall short by much.
uint16_t unit_of_6_bits(float largest) {
  const uint16_t nearest = round_to_f16(largest / 63);
  return static_cast<uint16_t>(63 * widen_f16(nearest) < largest ? nearest + 1 : nearest);
}

void quantize_q4_k(const float* x, uint8_t* gguf) {
  float scale[8], low[8];
  for (int i = 0; i < 8; ++i) search_line(x + 32 * i, scale[i], low[i]);
  const uint16_t unit = unit_of_6_bits(*std::max_element(scale, scale + 8));
  const uint16_t minimum_unit = unit_of_6_bits(-*std::min_element(low, low + 8));
  put_f16(gguf, unit);
  put_f16(gguf + 2, minimum_unit);
  uint8_t chosen[8][2], codes[256];
  for (int i = 0; i < 8; ++i)
    settle_line(x + 32 * i, widen_f16(unit), widen_f16(minimum_unit), scale[i], low[i], chosen[i], codes + 32 * i);
  for (int i = 0; i < 4; ++i) {
    gguf[4 + i] = static_cast<uint8_t>(chosen[i][0] | (chosen[4 + i][0] >> 4 << 6));
    gguf[8 + i] = static_cast<uint8_t>(chosen[i][1] | (chosen[4 + i][1] >> 4 << 6));
    gguf[12 + i] = static_cast<uint8_t>((chosen[4 + i][0] & 15) | (chosen[4 + i][1] << 4));
  }
  for (int i = 0; i < 128; ++i) {
    const int at = i / 32 * 64 + i % 32;
    gguf[16 + i] = static_cast<uint8_t>(codes[at] | (codes[at + 32] << 4));
  }
}

float code_of_6_bits(float x, float per_unit) { return std::min(31.0f, std::max(-32.0f, std::nearbyint(x * per_unit))); }

// The scale of 16 elements: from divisions of the largest magnitude in about 32 the one that leaves the least squared error.
float search_scale(const float* x) {
  float extreme = 0;
  for (int k = 0; k < 16; ++k) extreme = std::fabs(x[k]) > std::fabs(extreme) ? x[k] : extreme;
  if (extreme == 0) return 0;
  float scale = 0, explained = 0;  // of the sum of squares
  for (int tenths = -330; tenths <= -300; ++tenths) {
    const float per_unit = 0.1f * static_cast<float>(tenths) / extreme;
    float sum_xq = 0, sum_qq = 0;
    for (int k = 0; k < 16; ++k) {
      const float q = code_of_6_bits(x[k], per_unit);
      sum_xq += x[k] * q, sum_qq += q * q;
    }
    if (sum_qq > 0 && sum_xq * sum_xq / sum_qq > explained) explained = sum_xq * sum_xq / sum_qq, scale = sum_xq / sum_qq;
  }
  return scale;
}

void quantize_q6_k(const float* x, uint8_t* gguf) {
  float scale[16], extreme = 0;
  for (int i = 0; i < 16; ++i) {
    scale[i] = search_scale(x + 16 * i);
    extreme = std::fabs(scale[i]) > std::fabs(extreme) ? scale[i] : extreme;
  }
  const uint16_t half = round_to_f16(extreme / -128);
  const float unit = widen_f16(half);
  uint8_t codes[256];
  for (int i = 0; i < 16; ++i) {
    const float chosen = unit == 0 ? 0 : std::min(127.0f, std::max(-128.0f, std::nearbyint(scale[i] / unit)));
    gguf[192 + i] = static_cast<uint8_t>(static_cast<int8_t>(chosen));
    const float step = unit * chosen, per_unit = step == 0 ? 0 : 1 / step;
    for (int k = 0; k < 16; ++k) codes[16 * i + k] = static_cast<uint8_t>(code_of_6_bits(x[16 * i + k], per_unit) + 32);
  }
  put_f16(gguf + 208, half);
  for (int i = 0; i < 128; ++i) {
    const int at = i / 64 * 128 + i % 64;
    gguf[i] = static_cast<uint8_t>((codes[at] & 15) | (codes[at + 64] << 4));
  }
  for (int i = 0; i < 64; ++i) {
    const uint8_t* first = codes + i / 32 * 128 + i % 32;
    gguf[128 + i] = static_cast<uint8_t>(first[0] >> 4 | first[32] >> 4 << 2 | first[64] >> 4 << 4 | first[96] >> 4 << 6);
  }
}

}  // namespace

void quantize_block(Encoding encoding, const float* elements, uint8_t* gguf) {
  if (encoding == Encoding::kQ8_0) return quantize_q8_0(elements, gguf);
  if (encoding == Encoding::kQ4_0) return quantize_q4_0(elements, gguf);
  if (encoding == Encoding::kQ4K) return quantize_q4_k(elements, gguf);
  quantize_q6_k(elements, gguf);
}

}  // namespace max_kernels
