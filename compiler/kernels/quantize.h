// What quantizing a block needs that no vector helps with: float16, and where GGUF keeps the parts of a block.
#pragma once

#include <cstdint>

namespace max_kernels {

// To nearest, ties to even; too large becomes infinite, and NaN stays NaN.
uint16_t round_to_f16(float value);
float widen_f16(uint16_t half);

// Of which 63 reach the largest: among the small float16 the nearest one would fall short by much.
uint16_t unit_of_6_bits(float largest);

void write_q8_0(uint16_t scale, const uint8_t* codes, uint8_t* gguf);
void write_q4_0(uint16_t scale, const uint8_t* codes, uint8_t* gguf);
// scales, minima: of 6 bits, one for each 32 codes.
void write_q4_k(uint16_t scale, uint16_t minimum, const uint8_t* scales, const uint8_t* minima, const uint8_t* codes,
                uint8_t* gguf);
// scales: one for each 16 codes.
void write_q6_k(uint16_t scale, const int8_t* scales, const uint8_t* codes, uint8_t* gguf);

}  // namespace max_kernels
