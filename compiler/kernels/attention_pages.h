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

// Writes a head's keys of `count` tokens side by side, `stride` elements from dimension to dimension. Each token alone
// would touch as many cache lines as there are dimensions: several are collected in lines of their own first.
template <class To>
MAX_INLINE void write_keys(const Attention& call, const float* keys, int64_t first, int64_t count,
                           typename To::Type* out, int64_t stride) {
  constexpr int64_t kMaxHeadDim = 1024;  // checked by attention()
  const int64_t dim = call.head_dim, from_token_to_token = (call.num_heads + 2 * call.num_kv_heads) * dim;
  float rotated[kMaxHeadDim];
  if (count == 1) {
    rotate(call, keys, first, 1.0f, rotated);
    return write_elements<To>(rotated, dim, out, stride);
  }
  alignas(64) typename To::Type lines[kMaxHeadDim * kKeysOfLine];
  for (int64_t t = 0; t < count; ++t) {
    rotate(call, keys + t * from_token_to_token, first + t, 1.0f, rotated);
    write_elements<To>(rotated, dim, lines + t, kKeysOfLine);
  }
  for (int64_t i = 0; i < dim; ++i, out += stride) {
    if (count == kKeysOfLine) {
      __builtin_memcpy(out, lines + i * kKeysOfLine, kKeysOfLine * sizeof *out);
    } else {
      __builtin_memcpy(out, lines + i * kKeysOfLine, static_cast<size_t>(count) * sizeof *out);
    }
  }
}

template <class To>
MAX_INLINE void write_side_by_side(const Attention& call, int64_t first, int64_t count) {
  using Element = typename To::Type;
  const int64_t heads = call.num_heads + 2 * call.num_kv_heads, dim = call.head_dim;
  const int64_t page = call.slots[first] / call.page_tokens, offset = call.slots[first] % call.page_tokens;
  const int64_t head_size = call.page_tokens * dim, stride = block_tokens(call, offset);
  const float* keys = call.qkv + (first * heads + call.num_heads) * dim;
  const float* values = keys + call.num_kv_heads * dim;
  Element* first_key = static_cast<Element*>(call.pages) + page * 2 * call.num_kv_heads * head_size;
  Element* first_value = first_key + call.num_kv_heads * head_size + offset * dim;
  first_key += key_in_head(call, offset);
  const auto prefetch_head = [&](int64_t h) {
    for (int64_t i = 0; i < dim; ++i) __builtin_prefetch(first_key + h * head_size + i * stride, 1);
    prefetch_lines_at<true>(first_value + h * head_size, count * dim * static_cast<int64_t>(sizeof(Element)));
    for (int64_t t = 0; t < count; ++t) {
      prefetch_lines_at<false>(keys + (t * heads + h) * dim, dim * 4);
      prefetch_lines_at<false>(values + (t * heads + h) * dim, dim * 4);
    }
  };
  const int64_t ahead = count == 1 ? call.num_kv_heads : 1;  // the lines of a single token fit the first cache
  for (int64_t h = 0; h < ahead; ++h) prefetch_head(h);
  for (int64_t h = 0; h < call.num_kv_heads; ++h) {
    if (h + ahead < call.num_kv_heads) prefetch_head(h + ahead);
    write_keys<To>(call, keys + h * dim, first, count, first_key + h * head_size, stride);
    for (int64_t t = 0; t < count; ++t)
      write_elements<To>(values + (t * heads + h) * dim, dim, first_value + h * head_size + t * dim, 1);
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
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(static_cast<const char*>(memory) + kPrefetch + at);
}
