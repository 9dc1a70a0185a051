// Attention of a few queries over one kv head's pages, with an online softmax. Included as vector.h is; needs
// kAttendRows and kAttendVectors, the queries and vectors of H whose sums fit the registers.
//
// A query visits its keys in ascending blocks that start at the same keys whatever else is in the tile, and what it
// must not see enters as a weight of 0: its bits depend on its own position only.
// Sources: PagedAttention, arXiv:2309.06180; online softmax, arXiv:1805.02867.

// The queries of one kv head; those of the tile's heads follow each other.
struct TileState {
  int64_t num_queries, group, width, stride;  // width: floats of a head that hold data; stride: padded to vectors
  float *queries, *sums, *scores, *keys, *values, *peaks, *totals;
  const int32_t* positions;  // of the tile's tokens
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

// `count` tokens of one head from a page as float32, `stride` floats apart with zeros behind each; in place where they lie so.
MAX_INLINE const float* widen(const Attention& call, int64_t at, int64_t count, const TileState& s, float* scratch) {
  if (!call.pages_are_bf16 && s.stride == s.width) return static_cast<const float*>(call.pages) + at;
  for (int64_t n = 0; n < count; ++n) {
    float* out = scratch + n * s.stride;
    int64_t i = 0;
    const int64_t element = call.pages_are_bf16 ? 2 : 4;
    prefetch_ahead(static_cast<const char*>(call.pages) + (at + n * s.width) * element, s.width * element);
    if (call.pages_are_bf16) {
      const uint16_t* in = static_cast<const uint16_t*>(call.pages) + at + n * s.width;
      for (; i + kLanes <= s.width; i += kLanes) store(out + i, load_bf16(in + i));
      for (; i < s.width; ++i) {
        const uint32_t bits = static_cast<uint32_t>(in[i]) << 16;
        __builtin_memcpy(out + i, &bits, sizeof bits);
      }
    } else {
      const float* in = static_cast<const float*>(call.pages) + at + n * s.width;
      for (; i < s.width; ++i) out[i] = in[i];
    }
    for (; i < s.stride; ++i) out[i] = 0.0f;
  }
  return scratch;
}

// Scores of one query with kLanes keys; the last of `count` stands in for those that are missing.
template <bool Full, int Vectors>
MAX_INLINE Vec score(const float* query, const float* keys, int64_t stride, int64_t count) {
  const int64_t num_vectors = Vectors > 0 ? Vectors : stride / kLanes;
  Vec partial[kLanes];
#pragma GCC unroll 16
  for (int j = 0; j < kLanes; ++j) {
    const float* key = keys + (Full || j < count ? j : count - 1) * stride;
    Vec sum{};
#pragma GCC unroll 16
    for (int64_t v = 0; v < num_vectors; ++v) sum = multiply_add(load(query + v * kLanes), load(key + v * kLanes), sum);
    partial[reversed_lane(j)] = sum;
  }
  return sum_lanes<kLanes>(partial);
}

template <int Vectors>
static void score_block(const TileState& s, const float* keys, int64_t count) {
  for (int64_t k = 0; k < count; k += kLanes) {
    const float* group = keys + k * s.stride;
    if (keys != s.keys) prefetch_ahead(group, kLanes * s.stride * 4);
    for (int64_t n = 0; n < s.num_queries; ++n) {
      const float* query = s.queries + n * s.stride;
      const Vec scores = k + kLanes <= count ? score<true, Vectors>(query, group, s.stride, kLanes)
                                             : score<false, Vectors>(query, group, s.stride, count - k);
      store(s.scores + n * kBlockTokens + k, scores);
    }
  }
}

MAX_INLINE Bits lanes_below(int64_t limit) {
  Bits lane{};
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  return lane < (Bits{} + static_cast<int32_t>(limit < kLanes ? limit : kLanes));
}

// Turns the scores of one query's `seen` keys of a block of `count` into weights, against its peak so far.
MAX_INLINE void weigh(const TileState& s, int64_t query, int64_t seen, int64_t count) {
  float* scores = s.scores + query * kBlockTokens;
  Vec highest = broadcast(-__builtin_inff());
  for (int64_t k = 0; k < seen; k += kLanes) {
    const Vec visible = lanes_below(seen - k) ? load(scores + k) : highest;
    highest = visible > highest ? visible : highest;
  }
  const float of_block = highest_of(highest);
  const float peak = of_block > s.peaks[query] ? of_block : s.peaks[query];
  if (peak > s.peaks[query]) {
    const Vec shrink = exponential(broadcast(s.peaks[query]) - peak);
    s.peaks[query] = peak;
    store(s.totals + query * kLanes, load(s.totals + query * kLanes) * shrink);
    float* sums = s.sums + query * s.stride;
    for (int64_t i = 0; i < s.stride; i += kLanes) store(sums + i, load(sums + i) * shrink);
  }
  Vec total = load(s.totals + query * kLanes);
  for (int64_t k = 0; k < count; k += kLanes) {
    const Vec weights = lanes_below(seen - k) ? exponential(load(scores + k) - peak) : Vec{};
    total = total + weights;
    store(scores + k, weights);
  }
  store(s.totals + query * kLanes, total);
}

static void add_values(const TileState& s, const float* values, int64_t count) {
  using Wide = Tiles<kAttendVectors, typename MakeIndices<kAttendRows>::type>;
  using Narrow = Tiles<1, typename MakeIndices<kAttendRows>::type>;
  const bool in_scratch = values == s.values;
  for (int64_t n = 0; n < s.num_queries; n += kAttendRows) {
    const int64_t rows = s.num_queries - n < kAttendRows ? s.num_queries - n : kAttendRows;
    TileShape t{s.scores + n * kBlockTokens, kBlockTokens, s.sums + n * s.stride, s.stride, count, true};
    const float* in = values;
    const float* end = in + s.stride;
    const auto wide = n > 0 || in_scratch ? Wide::cached_f32[rows - 1] : Wide::f32[rows - 1];
    for (; in + kAttendVectors * kLanes <= end; in += kAttendVectors * kLanes, t.y += kAttendVectors * kLanes)
      wide(t, in, s.stride);
    for (; in < end; in += kLanes, t.y += kLanes) Narrow::cached_f32[rows - 1](t, in, s.stride);
  }
}

// The queries of the tile's `head`-th head.
MAX_INLINE TileState of_head(const TileState& first, int64_t head) {
  TileState s = first;
  const int64_t query = head * s.num_queries;
  s.queries += query * s.stride;
  s.sums += query * s.stride;
  s.scores += query * kBlockTokens;
  s.totals += query * kLanes;
  s.peaks += query;
  return s;
}

// One block of `count` keys for `num_heads` heads; the first lies at element `at` of the pages.
static void attend_block(const Attention& call, const TileState& first, int64_t num_heads, int64_t at,
                         int64_t first_key, int64_t count) {
  const int64_t head_size = call.page_tokens * call.head_dim, values_at = at + call.num_kv_heads * head_size;
  const auto score_keys = first.stride == 64    ? score_block<64 / kLanes>
                          : first.stride == 128 ? score_block<128 / kLanes>
                                                : score_block<0>;
  for (int64_t h = 0; h < num_heads; ++h) {
    const TileState s = of_head(first, h);
    score_keys(s, widen(call, at + h * head_size, count, s, s.keys), count);
    for (int64_t n = 0; n < s.num_queries; ++n) {
      const int64_t seen = s.positions[n / s.group] + 1 - first_key;
      weigh(s, n, seen < 0 ? 0 : seen < count ? seen : count, count);
    }
  }
  for (int64_t h = 0; h < num_heads; ++h) {
    const TileState s = of_head(first, h);
    add_values(s, widen(call, values_at + h * head_size, count, s, s.values), count);
  }
}

static TileState start_tile(const Attention& call, QueryTile tile, float* scratch) {
  TileState s;
  s.group = call.num_heads / call.num_kv_heads;
  s.num_queries = tile.num_tokens * s.group;
  s.width = call.head_dim;
  s.stride = (s.width + 15) / 16 * 16;
  const int64_t all_queries = tile.num_kv_heads * s.num_queries;
  s.queries = scratch;
  s.sums = s.queries + all_queries * s.stride;
  s.scores = s.sums + all_queries * s.stride;
  s.keys = s.scores + all_queries * kBlockTokens;
  s.values = s.keys + kBlockTokens * s.stride;
  s.totals = s.values + kBlockTokens * s.stride;
  s.peaks = s.totals + all_queries * kLanes;
  s.positions = call.positions + tile.first_token;
  const int64_t heads = call.num_heads + 2 * call.num_kv_heads;
  for (int64_t n = 0; n < all_queries; ++n) {
    const int64_t token = tile.first_token + n % s.num_queries / s.group;
    const int64_t head = (tile.first_kv_head + n / s.num_queries) * s.group + n % s.group;
    float* query = s.queries + n * s.stride;
    rotate(call, call.qkv + (token * heads + head) * s.width, token, call.scale, query);
    for (int64_t i = s.width; i < s.stride; ++i) query[i] = 0.0f;
    for (int64_t i = 0; i < s.stride; ++i) s.sums[n * s.stride + i] = 0.0f;
    store(s.totals + n * kLanes, Vec{});
    s.peaks[n] = -__builtin_inff();
  }
  return s;
}

MAX_INLINE void write_results(const Attention& call, const TileState& s, QueryTile tile) {
  for (int64_t n = 0; n < tile.num_kv_heads * s.num_queries; ++n) {
    const int64_t token = tile.first_token + n % s.num_queries / s.group;
    const int64_t head = (tile.first_kv_head + n / s.num_queries) * s.group + n % s.group;
    const float share = 1.0f / sum_of(load(s.totals + n * kLanes));
    float* out = call.out + (token * call.num_heads + head) * s.width;
    // Adding 0 makes a zero positive: a masked weight may have turned its sign.
    for (int64_t i = 0; i < s.width; ++i) out[i] = s.sums[n * s.stride + i] * share + 0.0f;
  }
}

static void attend(const Attention& call, QueryTile tile, float* scratch) {
  const TileState s = start_tile(call, tile, scratch);
  int64_t last = 0;
  for (int64_t t = 0; t < tile.num_tokens; ++t) last = s.positions[t] > last ? s.positions[t] : last;
  const int32_t* table = call.page_table + call.rows[tile.first_token] * call.max_pages;
  for (int64_t key = 0; key <= last;) {
    const int64_t page = table[key / call.page_tokens], offset = key % call.page_tokens;
    const int64_t in_page = call.page_tokens - offset, visible = last + 1 - key;
    const int64_t block = in_page < kBlockTokens ? in_page : kBlockTokens;
    const int64_t head = page * 2 * call.num_kv_heads + tile.first_kv_head;
    attend_block(call, s, tile.num_kv_heads, (head * call.page_tokens + offset) * call.head_dim, key,
                 visible < block ? visible : block);
    key += block;
  }
  write_results(call, s, tile);
}
