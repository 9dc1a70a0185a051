// The pages of keys and values as attention reads and writes them. Included as vector.h is.

MAX_INLINE Vec load_any(const float* p) { return load(p); }
MAX_INLINE Vec load_any(const uint16_t* p) { return load_bf16(p); }

// Up to kLanes elements as a vector with zeros behind them.
template <class Element>
MAX_INLINE Vec load_part(const Element* in, int64_t count) {
  if (count >= kLanes) return load_any(in);
  Element part[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) part[i] = in[i];
  return load_any(part);
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

// Elements of a page from float32: finite, and rounded to what is kept.
struct ToFloat {
  using Type = float;
  MAX_INLINE Vec of(Vec x) { return finite(x, 0x1.fffffep127f); }
};
struct ToBf16 {
  using Type = uint16_t;
  MAX_INLINE NarrowHalves of(Vec x) { return rounded_to_bf16(finite(x, 0x1.fep127f)); }
};

// Writes elements `stride` apart.
template <class To>
MAX_INLINE void write_elements(const float* x, int64_t count, typename To::Type* out, int64_t stride) {
  for (int64_t i = 0; i < count; i += kLanes, out += kLanes * stride) {
    const int64_t lanes = count - i < kLanes ? count - i : kLanes;
    const auto values = To::of(load_part(x + i, lanes));
    if (stride == 1) {
      __builtin_memcpy(out, &values, lanes * sizeof *out);
    } else {
      for (int64_t j = 0; j < lanes; ++j) out[j * stride] = values[j];
    }
  }
}

// Hints for memory that is used at once but lies in strides: its lines come together instead of one after the other.
template <bool Writes>
MAX_INLINE void prefetch_lines_at(const void* memory, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(static_cast<const char*>(memory) + at, Writes);
}

constexpr int64_t kMaxHeadDim = 1024;  // checked by attention()

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

// How many tokens from `first` on have keys side by side in a block, of those before `end`; at most kKeysOfLine.
MAX_INLINE int64_t tokens_side_by_side(const Attention& call, int64_t first, int64_t end) {
  const int64_t offset = call.slots[first] % call.page_tokens;
  const int64_t left = block_tokens(call, offset) - offset % kBlockTokens;
  int64_t most = end - first < kKeysOfLine ? end - first : kKeysOfLine, count = 1;
  most = left < most ? left : most;
  while (count < most && call.slots[first + count] == call.slots[first] + count) ++count;
  return count;
}

// Where some heads of tokens side by side are, in qkv and in their page.
template <class To>
struct HeadsToWrite {
  const float *keys, *values;  // of the first token and head; the next head follows, the next token `to_token` floats on
  int64_t to_token;
  typename To::Type *key, *value;  // the next head `to_head` elements on, the next dimension of a key `to_dimension`
  int64_t to_head, to_dimension;
  int64_t num_heads, dim;
};

// A token alone: as many cache lines as its keys have dimensions, which are asked for all at once.
template <class To>
MAX_INLINE void write_token(const Attention& call, const HeadsToWrite<To>& w, int64_t token) {
  float rotated[kMaxHeadDim];
  for (int64_t h = 0; h < w.num_heads; ++h) {
    for (int64_t i = 0; i < w.dim; ++i) __builtin_prefetch(w.key + h * w.to_head + i * w.to_dimension, 1);
    prefetch_lines_at<true>(w.value + h * w.to_head, w.dim * static_cast<int64_t>(sizeof *w.value));
  }
  for (int64_t h = 0; h < w.num_heads; ++h) {
    rotate(call, w.keys + h * w.dim, token, 1.0f, rotated);
    write_elements<To>(rotated, w.dim, w.key + h * w.to_head, w.to_dimension);
    write_elements<To>(w.values + h * w.dim, w.dim, w.value + h * w.to_head, 1);
  }
}

// Several tokens: the keys of each are collected in lines of their own, and written when all are there. Inputs are read
// in their order, and a share of the lines to write is asked for with every token.
template <class To>
MAX_INLINE void write_tokens_of_heads(const Attention& call, const HeadsToWrite<To>& w, int64_t first, int64_t count) {
  alignas(64) typename To::Type lines[kMaxHeadDim * kKeysOfLine];
  float rotated[kMaxHeadDim];
  const int64_t width = w.num_heads * w.dim;
  for (int64_t t = 0; t < count; ++t) {
    const float *keys = w.keys + t * w.to_token, *values = w.values + t * w.to_token;
    if (t + 1 < count) {
      prefetch_lines_at<false>(keys + w.to_token, width * 4);
      prefetch_lines_at<false>(values + w.to_token, width * 4);
    }
    for (int64_t h = 0; h < w.num_heads; ++h) {
      for (int64_t i = w.dim * t / count; i < w.dim * (t + 1) / count; ++i)
        __builtin_prefetch(w.key + h * w.to_head + i * w.to_dimension, 1);
      rotate(call, keys + h * w.dim, first + t, 1.0f, rotated);
      write_elements<To>(rotated, w.dim, lines + h * w.dim * kKeysOfLine + t, kKeysOfLine);
      write_elements<To>(values + h * w.dim, w.dim, w.value + h * w.to_head + t * w.dim, 1);
    }
  }
  const typename To::Type* line = lines;
  for (int64_t h = 0; h < w.num_heads; ++h) {
    typename To::Type* key = w.key + h * w.to_head;
    for (int64_t i = 0; i < w.dim; ++i, key += w.to_dimension, line += kKeysOfLine) {
      if (count == kKeysOfLine) {
        __builtin_memcpy(key, line, kKeysOfLine * sizeof *key);
      } else {
        __builtin_memcpy(key, line, static_cast<size_t>(count) * sizeof *key);
      }
    }
  }
}

template <class To>
MAX_INLINE void write_side_by_side(const Attention& call, int64_t first, int64_t count) {
  const int64_t heads = call.num_heads + 2 * call.num_kv_heads, dim = call.head_dim;
  const int64_t page = call.slots[first] / call.page_tokens, offset = call.slots[first] % call.page_tokens;
  const int64_t head_size = call.page_tokens * dim, most_heads = kMaxHeadDim / dim;
  const float* keys = call.qkv + (first * heads + call.num_heads) * dim;
  auto* pages = static_cast<typename To::Type*>(call.pages) + page * 2 * call.num_kv_heads * head_size;
  for (int64_t h = 0; h < call.num_kv_heads; h += most_heads) {
    const int64_t left = call.num_kv_heads - h;
    const HeadsToWrite<To> w{keys + h * dim,
                             keys + (call.num_kv_heads + h) * dim,
                             heads * dim,
                             pages + h * head_size + key_in_head(call, offset),
                             pages + (call.num_kv_heads + h) * head_size + offset * dim,
                             head_size,
                             block_tokens(call, offset),
                             left < most_heads ? left : most_heads,
                             dim};
    count == 1 ? write_token(call, w, first) : write_tokens_of_heads(call, w, first, count);
  }
}

// Tokens [first, end) without padding among them.
static void write_tokens(const Attention& call, int64_t first, int64_t end) {
  for (int64_t count; first < end; first += count) {
    count = tokens_side_by_side(call, first, end);
    call.pages_are_bf16 ? write_side_by_side<ToBf16>(call, first, count)
                        : write_side_by_side<ToFloat>(call, first, count);
  }
}

// The heads of a page lie one after the other, first all keys, then all values: a tile of several heads reads one
// stream. Its hints still matter, as the work on a line is longer than the CPU looks ahead.
MAX_INLINE void prefetch_ahead(const void* memory, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(static_cast<const char*>(memory) + kHintBytes + at);
}
