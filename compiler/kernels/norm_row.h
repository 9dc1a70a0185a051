// The root-mean-square norm of a row. Included as vector.h is.

// The squares are summed in four vectors, then by lanes, then the rest of the row: one order for every call.
static void norm_row(const RmsNorm& call, int64_t row) {
  constexpr int kSums = 4;
  const int64_t width = call.width, begin = row * width;
  const float* x = call.x + begin;
  if (call.delta != nullptr) {
    const float* delta = call.delta + begin;
    float* sum = call.sum + begin;
    int64_t i = 0;
    for (; i + kLanes <= width; i += kLanes) store(sum + i, load(x + i) + load(delta + i));
    for (; i < width; ++i) sum[i] = x[i] + delta[i];
    x = sum;
  }
  Vec squares[kSums] = {};
  int64_t i = 0;
  for (; i + kSums * kLanes <= width; i += kSums * kLanes) {
    for (int k = 0; k < kSums; ++k) {
      const Vec v = load(x + i + k * kLanes);
      squares[k] = multiply_add(v, v, squares[k]);
    }
  }
  float total = sum_of((squares[0] + squares[1]) + (squares[2] + squares[3]));
  for (; i < width; ++i) total += x[i] * x[i];
  const float scale = 1.0f / __builtin_sqrtf(total / static_cast<float>(width) + call.epsilon);
  float* y = call.y + begin;
  for (i = 0; i + kLanes <= width; i += kLanes) store(y + i, load(x + i) * broadcast(scale) * load(call.weight + i));
  for (; i < width; ++i) y[i] = x[i] * scale * call.weight[i];
}
