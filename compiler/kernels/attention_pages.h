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

// Up to kLanes elements as a vector with zeros behind them.
template <class Elements>
MAX_INLINE Vec load_part(const typename Elements::Type* in, int64_t count) {
  if (count >= kLanes) return Elements::at(in);
  typename Elements::Type part[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) part[i] = in[i];
  return Elements::at(part);
}

// (a, b) turned by an angle; T is a vector or, for what is left behind whole ones, a float, with the same bits.
template <class T>
MAX_INLINE T turned_first(T a, T b, T cos, T sin, float scale) {
  return (a * cos - b * sin) * scale;
}
template <class T>
MAX_INLINE T turned_second(T a, T b, T cos, T sin, float scale) {
  return (b * cos + a * sin) * scale;
}

MAX_INLINE void rotate(const Attention& call, const float* x, int64_t token, float scale, float* out) {
  const int64_t half = call.rotary_dim / 2;
  const float* cos = call.cos + token * half;
  const float* sin = call.sin + token * half;
  int64_t i = 0;
  for (; i + kLanes <= half; i += kLanes) {
    const Vec a = load(x + i), b = load(x + i + half), c = load(cos + i), s = load(sin + i);
    store(out + i, turned_first(a, b, c, s, scale));
    store(out + i + half, turned_second(a, b, c, s, scale));
  }
  for (; i < half; ++i) {
    const float a = x[i], b = x[i + half];
    out[i] = turned_first(a, b, cos[i], sin[i], scale);
    out[i + half] = turned_second(a, b, cos[i], sin[i], scale);
  }
  for (i = 2 * half; i + kLanes <= call.head_dim; i += kLanes) store(out + i, load(x + i) * scale);
  for (; i < call.head_dim; ++i) out[i] = x[i] * scale;
}

// The next owner of a page multiplies what is left in it by zero: that must not be NaN or infinite.
MAX_INLINE Vec finite(Vec x, float limit) {
  const Vec value = at_most(at_least(x, -limit), limit);
  return value == value ? value : Vec{};
}

MAX_INLINE NarrowHalves rounded_to_bf16(Vec x) {
  const Bits bits = reinterpret_cast<Bits>(x);
  return __builtin_convertvector((bits + 0x7fff + ((bits >> 16) & 1)) >> 16, NarrowHalves);
}

// Elements of a page made finite, `stride` apart in it.
template <class Element, class Narrow>
MAX_INLINE void write_elements(const float* x, int64_t count, Element* out, int64_t stride, const Narrow& narrow) {
  for (int64_t i = 0; i < count; i += kLanes, out += kLanes * stride) {
    const int64_t lanes = count - i < kLanes ? count - i : kLanes;
    const auto values = narrow(load_part<FloatElements>(x + i, lanes));
    if (stride == 1) {
      __builtin_memcpy(out, &values, lanes * sizeof *out);
    } else {
      for (int64_t j = 0; j < lanes; ++j) out[j * stride] = values[j];
    }
  }
}

MAX_INLINE void write_finite(const float* x, int64_t count, bool as_bf16, void* pages, int64_t at, int64_t stride) {
  if (as_bf16) {
    write_elements(x, count, static_cast<uint16_t*>(pages) + at, stride,
                   [](Vec v) { return rounded_to_bf16(finite(v, 0x1.fep127f)); });
  } else {
    write_elements(x, count, static_cast<float*>(pages) + at, stride,
                   [](Vec v) { return finite(v, 0x1.fffffep127f); });
  }
}

// Hints for memory that is used at once but lies in strides: its lines come together instead of one after the other.
template <bool Writes>
MAX_INLINE void prefetch_lines_at(const void* memory, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(static_cast<const char*>(memory) + at, Writes);
}

// The keys of a head in a page lie in blocks of kBlockTokens, the last one perhaps shorter, and each block as [H][tokens]:
// a vector takes one dimension of neighbouring keys. Values lie as [page_tokens][H].

// The tokens of the block that holds the token `offset` of a page.
MAX_INLINE int64_t block_tokens(const Attention& call, int64_t offset) {
  const int64_t left = call.page_tokens - offset / kBlockTokens * kBlockTokens;
  return left < kBlockTokens ? left : kBlockTokens;
}

// Where its key begins; further dimensions follow block_tokens() elements apart.
MAX_INLINE int64_t key_in_head(const Attention& call, int64_t offset) {
  const int64_t in_block = offset % kBlockTokens;
  return (offset - in_block) * call.head_dim + in_block;
}

static void write_token(const Attention& call, int64_t token) {
  constexpr int64_t kMaxHeadDim = 1024;  // checked by attention()
  float rotated[kMaxHeadDim];
  const int64_t heads = call.num_heads + 2 * call.num_kv_heads, dim = call.head_dim;
  const int64_t page = call.slots[token] / call.page_tokens, offset = call.slots[token] % call.page_tokens;
  const float* keys = call.qkv + (token * heads + call.num_heads) * dim;
  const float* values = keys + call.num_kv_heads * dim;
  const int64_t head_size = call.page_tokens * dim, element = call.pages_are_bf16 ? 2 : 4;
  const int64_t stride = block_tokens(call, offset);
  const int64_t first_key = page * 2 * call.num_kv_heads * head_size + key_in_head(call, offset);
  const int64_t first_value = (page * 2 + 1) * call.num_kv_heads * head_size + offset * dim;
  const auto at = [&](int64_t index) { return static_cast<char*>(call.pages) + index * element; };
  for (int64_t h = 0; h < call.num_kv_heads; ++h) {
    for (int64_t i = 0; i < dim; ++i) __builtin_prefetch(at(first_key + h * head_size + i * stride), 1);
    prefetch_lines_at<true>(at(first_value + h * head_size), dim * element);
  }
  for (int64_t h = 0; h < call.num_kv_heads; ++h) {
    rotate(call, keys + h * dim, token, 1.0f, rotated);
    write_finite(rotated, dim, call.pages_are_bf16, call.pages, first_key + h * head_size, stride);
    write_finite(values + h * dim, dim, call.pages_are_bf16, call.pages, first_value + h * head_size, 1);
  }
}

// The heads of a page lie one after the other, first all keys, then all values: a tile of several heads reads one
// stream. Its hints still matter, as the work on a line is longer than the CPU looks ahead.
MAX_INLINE void prefetch_ahead(const void* memory, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(static_cast<const char*>(memory) + kPrefetch + at);
}
