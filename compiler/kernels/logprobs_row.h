// The log-softmax of a row, at its highest values and one more. Included as vector.h is.

// NaN counts as the lowest number, and infinities as the largest ones: every result is a number.
MAX_INLINE Vec finite(Vec v) {
  const Vec number = v == v ? v : broadcast(-0x1.fffffep127f);
  return at_most(at_least(number, -0x1.fffffep127f), 0x1.fffffep127f);
}

// Sums of exponentials stay short in float32; their sum is taken in float64.
static double sum_of_exponentials(const float* x, int64_t count, float peak) {
  double total = 0;
  for (int64_t begin = 0; begin < count; begin += kSumChunk) {
    const int64_t end = count - begin < kSumChunk ? count : begin + kSumChunk;
    Vec sum{};
    for (int64_t i = begin; i < end; i += kLanes) sum = sum + exponential(load_up_to(x + i, end - i) - peak);
    total += sum_of(sum);
  }
  return total;
}

MAX_INLINE float normalized(float x, double peak, double normalizer) {
  const double value = x - peak - normalizer;
  return value < -0x1.fffffep127 ? -0x1.fffffep127f : static_cast<float>(value);
}

// scratch: logprobs_scratch() floats
static void logprobs_row(const Logprobs& call, int64_t row, float* scratch) {
  const int64_t count = call.num_columns, top = call.num_top;
  const float* logits = call.logits + row * count;
  float* x = scratch;
  float* maxima = x + count + kLanes;
  float* values = maxima + count + kLanes;
  int32_t* columns = reinterpret_cast<int32_t*>(values + count);
  for (int64_t i = 0; i < count; i += kLanes) store(x + i, finite(load_up_to(logits + i, count - i)));

  const Stripes stripes{x, count, vectors_of_stripe(count, top), maxima};
  const float peak = fill_maxima(stripes);
  const double normalizer = __builtin_log(sum_of_exponentials(x, count, peak));
  call.chosen[row] = normalized(x[call.ids[row] < 0 ? 0 : call.ids[row]], peak, normalizer);

  const float bound = reached_by(maxima, stripes.number(), top, top / 4, peak);
  const int64_t found = collect_reaching(stripes, bound, values, columns);
  float* best = call.top + row * top;
  int32_t* best_ids = call.top_ids + row * top;
  int64_t kept = 0;
  for (int64_t i = 0; i < found; ++i) {
    // Columns ascend: of equal values the one that is there already stays in front.
    if (kept == top && values[i] <= best[top - 1]) continue;
    int64_t at = kept < top ? kept++ : top - 1;
    for (; at > 0 && best[at - 1] < values[i]; --at) best[at] = best[at - 1], best_ids[at] = best_ids[at - 1];
    best[at] = values[i], best_ids[at] = columns[i];
  }
  for (int64_t i = 0; i < top; ++i) best[i] = normalized(best[i], peak, normalizer);
}
