// Draws a token from a row of logits: penalties, bias and mask, temperature, top-k, top-p, min-p, and the inverse of the
// cumulative distribution at one uniform number. Included as vector.h is, behind top_values.h and argmax_row.h.
//
// No sort of the row: top-k collects the few values above a bound, and top-p looks at ever fewer weights. Sums are short
// in float32 and longer ones in float64, in the order of the columns.

// Weights of the tokens that are left; columns is null where every column is.
struct Weighted {
  float* weights;  // with room for a vector more
  const int32_t* columns;
  int64_t count;
};

MAX_INLINE bool allows_all(const int32_t* mask, int64_t words) {
  int32_t all = -1;
  for (int64_t i = 0; i < words; ++i) all &= mask[i];
  return all == -1;
}

// The logits as a request wants them; `at` is its row of history and bias.
MAX_INLINE float adjusted(const Sampling& call, const SampleSettings& settings, float x, int64_t at) {
  const int32_t history = call.history[at];
  if (history != 0) x = x > 0 ? x / settings.repetition : x * settings.repetition;
  const int32_t occurrences = history >> 1;
  x -= settings.frequency * static_cast<float>(occurrences);
  if (occurrences > 0) x -= settings.presence;
  return x + call.bias[at];
}

// The row's logits, or what becomes of them in `out`.
static const float* adjust(const Sampling& call, int64_t row, float* out) {
  const int64_t count = call.num_columns, words = (count + 31) / 32;
  const float* x = call.logits + row * count;
  const int32_t* mask = call.mask + row * words;
  const SampleSettings& settings = call.settings[row];
  const int64_t place = call.numbers[row].adjusted;
  const bool masked = !allows_all(mask, words);
  if (place < 0 && !masked) return x;
  for (int64_t i = 0; i < count; ++i) out[i] = place < 0 ? x[i] : adjusted(call, settings, x[i], place * count + i);
  for (int64_t i = 0; masked && i < count; ++i) {
    if (((static_cast<uint32_t>(mask[i / 32]) >> (i % 32)) & 1) == 0) out[i] = -__builtin_inff();
  }
  return out;
}

// Keeps the k highest values and those that equal the last of them.
static Weighted keep_top(const Stripes& s, int64_t k, float peak, float* values, int32_t* columns) {
  const float bound = reached_by(s.maxima, s.number(), k, k / 4, peak);
  const int64_t found = collect_reaching(s, bound, values, columns);
  store(values + found, broadcast(-__builtin_inff()));
  const float least = reached_by(values, (found + kLanes - 1) / kLanes, k, 0, peak);
  int64_t kept = 0;
  for (int64_t i = 0; i < found; ++i) {
    values[kept] = values[i];
    columns[kept] = columns[i];
    kept += values[i] >= least;
  }
  return {values, columns, kept};
}

// weights = e ** ((x - peak) / temperature), 1 for the peak; returns their sum.
static double weigh_values(const float* x, int64_t count, float peak, float temperature, float* weights) {
  const float wanted = 1.0f / temperature;
  const float inverse = wanted < 0x1.fffffep127f ? wanted : 0x1.fffffep127f;  // 0 times infinity is no number
  double total = 0;
  for (int64_t begin = 0; begin < count; begin += kSumChunk) {
    const int64_t end = count - begin < kSumChunk ? count : begin + kSumChunk;
    Vec sum{};
    for (int64_t i = begin; i < end; i += kLanes) {
      const Vec weight = exponential((load_up_to(x + i, end - i) - peak) * inverse);
      store(weights + i, weight);
      sum = sum + weight;
    }
    total += sum_of(sum);
  }
  return total;
}

// The sums of the weights that reach each of a few thresholds.
constexpr int kThresholds = 6;
static void sums_reaching(const float* weights, int64_t count, const float* thresholds, double* sums) {
  Vec bound[kThresholds];
  for (int t = 0; t < kThresholds; ++t) sums[t] = 0, bound[t] = broadcast(thresholds[t]);
  for (int64_t begin = 0; begin < count; begin += kSumChunk) {
    const int64_t end = count - begin < kSumChunk ? count : begin + kSumChunk;
    Vec sum[kThresholds] = {};
    for (int64_t i = begin; i < end; i += kLanes) {
      const Vec weight = load_up_to(weights + i, end - i);
#pragma GCC unroll 16
      for (int t = 0; t < kThresholds; ++t) sum[t] = sum[t] + (weight >= bound[t] ? weight : Vec{});
    }
    for (int t = 0; t < kThresholds; ++t) sums[t] += sum_of(sum[t]);
  }
}

// The largest of a few weights such that those from it upwards make `wanted`.
static float nucleus_of_few(float* weights, int64_t count, double wanted) {
  double sum = 0;
  for (int64_t i = 0; i < count; ++i) {
    int64_t highest = i;
    for (int64_t j = i + 1; j < count; ++j) highest = weights[j] > weights[highest] ? j : highest;
    const float weight = weights[highest];
    weights[highest] = weights[i];
    sum += weight;
    if (sum >= wanted) return weight;
  }
  return 0.0f;
}

// The weights in [low, high), in `kept`, which may be where they are and has room for a vector more; returns how many.
static int64_t keep_between(const float* weights, int64_t count, float low, float high, float* kept) {
  int64_t found = 0;
  for (int64_t i = 0; i < count; i += kLanes) {
    const Vec weight = load_up_to(weights + i, count - i);
    const uint32_t inside = lane_bits((weight >= broadcast(low)) & (weight < broadcast(high)));
    store_lanes(kept + found, weight, inside);
    found += __builtin_popcount(inside);
  }
  return found;
}

// The largest weight such that those from it upwards make `wanted`; weights are in [0, 1], `rest` has room for all.
static float nucleus(const float* weights, int64_t count, double wanted, float* rest) {
  constexpr int64_t kFew = 48;
  float low = 0.0f, high = 2.0f;  // the weight is in [low, high), and so are those in `weights`
  float thresholds[kThresholds] = {0x1p-2f, 0x1p-4f, 0x1p-6f, 0x1p-8f, 0x1p-11f, 0x1p-14f};
  for (;;) {
    const int32_t first = order_of(low), range = order_of(high) - first;
    if (range <= 1) return low;
    if (count > kFew) {
      double sums[kThresholds];
      sums_reaching(weights, count, thresholds, sums);
      int t = 0;
      while (t < kThresholds && sums[t] < wanted) ++t;
      if (t > 0) high = thresholds[t - 1], wanted -= sums[t - 1];
      if (t < kThresholds) low = thresholds[t];
    }
    count = keep_between(weights, count, low, high, rest);
    weights = rest;
    if (count <= kFew) {
      const float found = nucleus_of_few(rest, count, wanted);
      return found > low ? found : low;
    }
    const int64_t start = order_of(low), width = order_of(high) - start;
    for (int t = 0; t < kThresholds; ++t) {
      const int64_t step = (width * (kThresholds - t) + kThresholds) / (kThresholds + 1);
      thresholds[t] = of_order(static_cast<int32_t>(start + (step > 0 ? step : 1)));
    }
  }
}

// The sum of up to kSumChunk weights that reach `least`.
MAX_INLINE float sum_chunk(const float* weights, int64_t count, float least) {
  Vec sum{};
  for (int64_t i = 0; i < count; i += kLanes) {
    const Vec weight = load_up_to(weights + i, count - i);
    sum = sum + (weight >= broadcast(least) ? weight : Vec{});
  }
  return sum_of(sum);
}

// The place where the running sum of the weights that reach `least` passes the share `u` of them all.
static int64_t invert(const Weighted& w, float least, double u) {
  double total = 0, before = 0;
  for (int64_t begin = 0; begin < w.count; begin += kSumChunk) {
    total += sum_chunk(w.weights + begin, w.count - begin < kSumChunk ? w.count - begin : kSumChunk, least);
  }
  const double target = u * total;
  int64_t begin = 0;
  for (; begin + kSumChunk < w.count; begin += kSumChunk) {
    const double after = before + sum_chunk(w.weights + begin, kSumChunk, least);
    if (after > target) break;
    before = after;
  }
  // Rounding may leave the sum of the last chunk just short of the target: then its last token is meant.
  int64_t found = 0;
  for (int64_t i = begin; i < w.count && i < begin + kSumChunk; ++i) {
    if (!(w.weights[i] >= least && w.weights[i] > 0)) continue;
    found = i;
    before += w.weights[i];
    if (before > target) break;
  }
  return found;
}

// One token of the row, or -1 where none can be drawn; scratch: sample_scratch() floats.
static int32_t sample_row(const Sampling& call, int64_t row, double u, float* scratch) {
  const SampleSettings& settings = call.settings[row];
  const int64_t count = call.num_columns, room = count + 2 * kLanes, top_k = call.numbers[row].top_k;
  float *maxima = scratch + room, *values = maxima + room, *rest = values + room;
  const float* x = adjust(call, row, scratch);
  const bool has_top_k = top_k > 0 && top_k < count;
  const Stripes stripes{x, count, vectors_of_stripe(count, has_top_k ? top_k : 1), maxima};
  bool has_nan = false;
  const float peak = fill_maxima(stripes, &has_nan);
  if (has_nan) return -1;
  if (!(settings.temperature > 0)) return static_cast<int32_t>(argmax_row(x, count));
  if (peak - peak != 0) return -1;  // infinite: there are no shares to draw from

  Weighted left{values, nullptr, count};
  if (has_top_k) left = keep_top(stripes, top_k, peak, values, reinterpret_cast<int32_t*>(rest + room));
  const double total = weigh_values(has_top_k ? values : x, left.count, peak, settings.temperature, values);
  float least = settings.min_p;
  if (settings.top_p < 1) {
    const float of_top_p = nucleus(values, left.count, settings.top_p * total, rest);
    least = of_top_p > least ? of_top_p : least;
  }
  const int64_t found = invert(left, least, u);
  return left.columns == nullptr ? static_cast<int32_t>(found) : left.columns[found];
}
