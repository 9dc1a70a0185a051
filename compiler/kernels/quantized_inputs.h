// Rounds inputs to int8, 32 that share a scale at a time. Included as vector.h is; needs kQ8Offset, what the codes of
// q8_0 stand above their weights when they are multiplied.

MAX_INLINE int32_t offset_of_codes(Encoding weights) {
  return weights == Encoding::kQ8_0 ? kQ8Offset : weights == Encoding::kQ4_0 ? 8 : weights == Encoding::kQ6K ? 32 : 0;
}

// The scale is the largest magnitude / 127, and NaN where an input is not finite. Inputs below 1e-30 count as zero.
MAX_INLINE void quantize_block_of_inputs(const float* x, Encoding weights, QuantizedInputs* out) {
  constexpr int kVectors = 32 / kLanes;
  Vec inputs[kVectors], largest{}, poison{};
  for (int v = 0; v < kVectors; ++v) {
    inputs[v] = load(x + v * kLanes);
    const Vec magnitude = reinterpret_cast<Vec>(reinterpret_cast<Bits>(inputs[v]) & 0x7fffffff);
    largest = magnitude > largest ? magnitude : largest;
    poison = poison + (inputs[v] - inputs[v]);
  }
  const float highest = highest_of(largest);
  const float per_unit = highest > 1e-30f ? 127 / highest : 0;
  Bits sums[2] = {};
  for (int v = 0; v < kVectors; ++v) {
    constexpr float kRounds = 12582912.0f;  // adding 3 * 2**22 leaves the nearest integer in the lowest bits
    const Vec rounded = inputs[v] * per_unit + kRounds;
    const Bits values = reinterpret_cast<Bits>(rounded) - 0x4b400000;
    sums[v / (kVectors / 2)] += values;
    const NarrowBytes narrow = __builtin_convertvector(values, NarrowBytes);
    __builtin_memcpy(out->values + v * kLanes, &narrow, sizeof narrow);
  }
  const int32_t first = spread_sum(sums[0])[0], second = spread_sum(sums[1])[0], offset = offset_of_codes(weights);
  out->start[0] = -offset * (weights == Encoding::kQ6K ? first : first + second);
  out->start[1] = -offset * second;
  out->scale = highest / 127 + spread_sum(poison)[0];
  out->minus_sum = -out->scale * static_cast<float>(first + second);
}

static void quantize_inputs(const float* x, int64_t num_blocks, Encoding weights, QuantizedInputs* quantized,
                            int64_t stride) {
  for (int64_t b = 0; b < num_blocks; ++b) quantize_block_of_inputs(x + b * 32, weights, quantized + b * stride);
}
