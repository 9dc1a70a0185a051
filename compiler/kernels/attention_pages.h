// The pages of keys and values as attention reads and writes them. Included as vector.h is.

// Elements of a page, widened when they are loaded.
struct FloatElements {
  using Type = float;
  MAX_INLINE Vec at(const float* p) { return load(p); }
};
struct Bf16Elements {
  using Type = uint16_t;
  MAX_INLINE Vec at(const uint16_t* p) { return load_bf16(p); }
};

MAX_INLINE void rotate(const Attention& call, const float* x, int64_t token, float scale, float* out) {
  const int64_t half = call.rotary_dim / 2;
  const float* cos = call.cos + token * half;
  const float* sin = call.sin + token * half;
  for (int64_t i = 0; i < half; ++i) {
    const float a = x[i], b = x[i + half];
    out[i] = (a * cos[i] - b * sin[i]) * scale;
    out[i + half] = (b * cos[i] + a * sin[i]) * scale;
  }
  for (int64_t i = 2 * half; i < call.head_dim; ++i) out[i] = x[i] * scale;
}

// The next owner of a page multiplies what is left in it by zero: that must not be NaN or infinite.
MAX_INLINE void write_finite(const float* x, int64_t count, bool as_bf16, void* pages, int64_t at) {
  const float limit = as_bf16 ? 0x1.fep127f : 0x1.fffffep127f;
  for (int64_t i = 0; i < count; ++i) {
    float value = x[i] < -limit ? -limit : x[i] > limit ? limit : x[i];
    value = value == value ? value : 0.0f;
    if (as_bf16) {
      uint32_t bits;
      __builtin_memcpy(&bits, &value, sizeof bits);
      static_cast<uint16_t*>(pages)[at + i] = static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
    } else {
      static_cast<float*>(pages)[at + i] = value;
    }
  }
}

static void write_token(const Attention& call, int64_t token) {
  constexpr int64_t kMaxHeadDim = 1024;  // checked by attention()
  float rotated[kMaxHeadDim];
  const int64_t heads = call.num_heads + 2 * call.num_kv_heads, dim = call.head_dim;
  const int64_t page = call.slots[token] / call.page_tokens, offset = call.slots[token] % call.page_tokens;
  const float* keys = call.qkv + (token * heads + call.num_heads) * dim;
  const float* values = keys + call.num_kv_heads * dim;
  for (int64_t h = 0; h < call.num_kv_heads; ++h) {
    const int64_t at = ((page * 2 * call.num_kv_heads + h) * call.page_tokens + offset) * dim;
    rotate(call, keys + h * dim, token, 1.0f, rotated);
    write_finite(rotated, dim, call.pages_are_bf16, call.pages, at);
    write_finite(values + h * dim, dim, call.pages_are_bf16, call.pages,
                 at + call.num_kv_heads * call.page_tokens * dim);
  }
}

// The heads of a page lie one after the other, first all keys, then all values: a tile of several heads reads one
// stream. Its hints still matter, as the work on a line is longer than the CPU looks ahead.
MAX_INLINE void prefetch_ahead(const void* memory, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(static_cast<const char*>(memory) + kPrefetch + at);
}

// `count` tokens of one head as float32, `stride` floats apart with zeros behind each.
template <class Elements>
MAX_INLINE void widen(const typename Elements::Type* in, int64_t count, int64_t width, int64_t stride, float* out) {
  for (int64_t n = 0; n < count; ++n, in += width, out += stride) {
    prefetch_ahead(in, width * sizeof(*in));
    int64_t i = 0;
    for (; i + kLanes <= width; i += kLanes) store(out + i, Elements::at(in + i));
    if (i < width) {
      typename Elements::Type last[kLanes] = {};
      for (int64_t j = i; j < width; ++j) last[j - i] = in[j];
      store(out + i, Elements::at(last));  // strides are multiples of the widest vector
      i += kLanes;
    }
    for (; i < stride; ++i) out[i] = 0.0f;
  }
}
