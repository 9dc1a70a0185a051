// Attention of a few queries over the pages of some kv heads, with an online softmax. Included as vector.h is; needs
// kAttendRows and kAttendVectors, the queries and vectors of H whose sums fit the registers.
//
// A row's keys are cut into segments and these into blocks, always at the same keys. A query's segments are summed up
// each on its own and then merged one after the other, by whatever threads; what it must not see enters as a weight of
// 0. So its bits depend on its own position only. Sources: PagedAttention, arXiv:2309.06180; online softmax,
// arXiv:1805.02867; splitting a row, Flash-Decoding (Dao et al., 2023).

// Softmax-weighted sums: `peaks` are the highest scores so far, `totals` (a vector each) and `sums` are relative to them.
struct Sums {
  float *sums, *totals, *peaks;
};

// The queries of one kv head; those of the tile's heads follow each other.
struct TileState {
  int64_t num_queries, group, width, stride;  // width: floats of a head that hold data; stride: padded to vectors
  float *queries, *scores, *widened;
  Sums part;                 // of one segment
  const int32_t* positions;  // of the tile's tokens
};

MAX_INLINE Sums sums_at(float* memory, int64_t queries, int64_t stride) {
  return {memory, memory + queries * stride, memory + queries * (stride + kPartVector)};
}

MAX_INLINE void clear(const Sums& s, int64_t queries, int64_t stride) {
  for (int64_t i = 0; i < queries * stride; i += kLanes) store(s.sums + i, Vec{});
  for (int64_t n = 0; n < queries; ++n) {
    store(s.totals + n * kPartVector, Vec{});
    s.peaks[n] = -__builtin_inff();
  }
}

// Scores of one query with kLanes keys; the last of `count` stands in for those that are missing.
template <class Elements, bool Full, int Vectors>
MAX_INLINE Vec score(const float* query, const typename Elements::Type* keys, int64_t stride, int64_t count) {
  const int64_t num_vectors = Vectors > 0 ? Vectors : stride / kLanes;
  Vec partial[kLanes];
#pragma GCC unroll 16
  for (int j = 0; j < kLanes; ++j) {
    const typename Elements::Type* key = keys + (Full || j < count ? j : count - 1) * stride;
    Vec sum{};
#pragma GCC unroll 16
    for (int64_t v = 0; v < num_vectors; ++v)
      sum = multiply_add(load(query + v * kLanes), Elements::at(key + v * kLanes), sum);
    partial[reversed_lane(j)] = sum;
  }
  return sum_lanes<kLanes>(partial);
}

template <class Elements, int Vectors>
static void score_block(const TileState& s, const typename Elements::Type* keys, int64_t count, bool prefetches) {
  for (int64_t k = 0; k < count; k += kLanes) {
    const typename Elements::Type* group = keys + k * s.stride;
    if (prefetches) prefetch_ahead(group, kLanes * s.stride * static_cast<int64_t>(sizeof(*group)));
    for (int64_t n = 0; n < s.num_queries; ++n) {
      const float* query = s.queries + n * s.stride;
      const Vec scores = k + kLanes <= count ? score<Elements, true, Vectors>(query, group, s.stride, kLanes)
                                             : score<Elements, false, Vectors>(query, group, s.stride, count - k);
      store(s.scores + n * kBlockTokens + k, scores);
    }
  }
}

template <class Elements>
MAX_INLINE void score_keys(const TileState& s, const typename Elements::Type* keys, int64_t count, bool prefetches) {
  if (s.stride == 64) return score_block<Elements, 64 / kLanes>(s, keys, count, prefetches);
  if (s.stride == 128) return score_block<Elements, 128 / kLanes>(s, keys, count, prefetches);
  score_block<Elements, 0>(s, keys, count, prefetches);
}

// All lanes from `first` to before `end`.
MAX_INLINE Bits lanes_between(int64_t first, int64_t end) {
  Bits lane{};
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  const int32_t low = static_cast<int32_t>(first < 0 ? 0 : first < kLanes ? first : kLanes);
  const int32_t high = static_cast<int32_t>(end < 0 ? 0 : end < kLanes ? end : kLanes);
  return (lane >= (Bits{} + low)) & (lane < (Bits{} + high));
}

// Turns the scores of one query with a block's keys into weights, against its peak so far; it sees [first, end) of them.
MAX_INLINE void weigh(const Attention& call, const TileState& s, int64_t query, int64_t first, int64_t end,
                      int64_t count) {
  float* scores = s.scores + query * kBlockTokens;
  float* totals = s.part.totals + query * kPartVector;
  Vec highest = broadcast(-__builtin_inff());
  for (int64_t k = 0; k < end; k += kLanes) {
    if (call.softcap > 0) {
      store(scores + k, hyperbolic_tangent(load(scores + k) * (1.0f / call.softcap)) * call.softcap);
    }
    const Vec visible = lanes_between(first - k, end - k) ? load(scores + k) : highest;
    highest = visible > highest ? visible : highest;
  }
  const float of_block = highest_of(highest);
  const float peak = of_block > s.part.peaks[query] ? of_block : s.part.peaks[query];
  if (peak > s.part.peaks[query]) {
    const Vec shrink = exponential(broadcast(s.part.peaks[query]) - peak);
    s.part.peaks[query] = peak;
    store(totals, load(totals) * shrink);
    float* sums = s.part.sums + query * s.stride;
    for (int64_t i = 0; i < s.stride; i += kLanes) store(sums + i, load(sums + i) * shrink);
  }
  Vec total = load(totals);
  for (int64_t k = 0; k < count; k += kLanes) {
    const Vec weights = lanes_between(first - k, end - k) ? exponential(load(scores + k) - peak) : Vec{};
    total = total + weights;
    store(scores + k, weights);
  }
  store(totals, total);
}

// Adds weighted values to the sums of a few queries, at Vectors vectors of their width.
template <class Elements, int Rows, int Vectors>
static void add_tile(const float* weights, const typename Elements::Type* values, float* sums, int64_t stride,
                     int64_t count, bool prefetches) {
  Vec sum[Rows][Vectors];
  for (int r = 0; r < Rows; ++r)
    for (int v = 0; v < Vectors; ++v) sum[r][v] = load(sums + r * stride + v * kLanes);
  for (int64_t k = 0; k < count; ++k, values += stride) {
    Vec value[Vectors];
#pragma GCC unroll 16
    for (int v = 0; v < Vectors; ++v) value[v] = Elements::at(values + v * kLanes);
    if (prefetches) prefetch_ahead(values, Vectors * kLanes * static_cast<int64_t>(sizeof(*values)));
    accumulate<Rows, Vectors>(weights + k, kBlockTokens, value, sum);
  }
  for (int r = 0; r < Rows; ++r)
    for (int v = 0; v < Vectors; ++v) store(sums + r * stride + v * kLanes, sum[r][v]);
}

template <class Elements, int Vectors, class Rows>
struct AddTiles;
template <class Elements, int Vectors, int... R>
struct AddTiles<Elements, Vectors, Indices<R...>> {
  using Add = void (*)(const float*, const typename Elements::Type*, float*, int64_t, int64_t, bool);
  static constexpr Add table[] = {add_tile<Elements, R + 1, Vectors>...};
};

template <class Elements>
MAX_INLINE void add_values(const TileState& s, const typename Elements::Type* values, int64_t count, bool prefetches) {
  using Rows = typename MakeIndices<kAttendRows>::type;
  constexpr int64_t kWide = kAttendVectors * kLanes;
  for (int64_t n = 0; n < s.num_queries; n += kAttendRows) {
    const int64_t rows = s.num_queries - n < kAttendRows ? s.num_queries - n : kAttendRows;
    const float* weights = s.scores + n * kBlockTokens;
    float* sums = s.part.sums + n * s.stride;
    const bool first = n == 0 && prefetches;
    int64_t i = 0;
    for (; i + kWide <= s.stride; i += kWide)
      AddTiles<Elements, kAttendVectors, Rows>::table[rows - 1](weights, values + i, sums + i, s.stride, count, first);
    for (; i < s.stride; i += kLanes)
      AddTiles<Elements, 1, Rows>::table[rows - 1](weights, values + i, sums + i, s.stride, count, first);
  }
}

// The queries of the tile's `head`-th head.
MAX_INLINE TileState of_head(const TileState& first, int64_t head) {
  TileState s = first;
  const int64_t query = head * s.num_queries;
  s.queries += query * s.stride;
  s.scores += query * kBlockTokens;
  s.part = {s.part.sums + query * s.stride, s.part.totals + query * kPartVector, s.part.peaks + query};
  return s;
}

// Few queries read a page's elements where they lie; for many, or between vectors, they are widened once.
template <class Elements, class Use>
MAX_INLINE void with_elements(const Attention& call, const TileState& s, int64_t at, int64_t count, const Use& use) {
  constexpr int64_t kFewQueries = 4;
  const auto* in = static_cast<const typename Elements::Type*>(call.pages) + at;
  const bool narrow = sizeof(*in) < sizeof(float);
  if (s.stride == s.width && !(narrow && s.num_queries > kFewQueries)) return use(Elements(), in, true);
  widen<Elements>(in, count, s.width, s.stride, s.widened);
  use(FloatElements(), s.widened, false);
}

// One block of `count` keys for `num_heads` heads; the first lies at element `at` of the pages.
template <class Elements>
static void attend_block(const Attention& call, const TileState& first, int64_t num_heads, int64_t at,
                         int64_t first_key, int64_t count) {
  const int64_t head_size = call.page_tokens * call.head_dim, values_at = at + call.num_kv_heads * head_size;
  for (int64_t h = 0; h < num_heads; ++h) {
    const TileState s = of_head(first, h);
    with_elements<Elements>(call, s, at + h * head_size, count, [&](auto elements, const auto* keys, bool prefetches) {
      score_keys<decltype(elements)>(s, keys, count, prefetches);
    });
    for (int64_t n = 0; n < s.num_queries; ++n) {
      const int64_t position = s.positions[n / s.group], end = position + 1 - first_key;
      const int64_t begin = call.window > 0 ? end - call.window : 0;
      weigh(call, s, n, begin, end < 0 ? 0 : end < count ? end : count, count);
    }
  }
  for (int64_t h = 0; h < num_heads; ++h) {
    const TileState s = of_head(first, h);
    with_elements<Elements>(call, s, values_at + h * head_size, count,
                            [&](auto elements, const auto* values, bool prefetches) {
                              add_values<decltype(elements)>(s, values, count, prefetches);
                            });
  }
}

// The tile's queries, rotated and scaled, and room for the rest of its state behind them.
static TileState start_tile(const Attention& call, const QueryTile& tile, float* scratch) {
  TileState s;
  s.group = call.num_heads / call.num_kv_heads;
  s.num_queries = tile.num_tokens * s.group;
  s.width = call.head_dim;
  s.stride = (s.width + 15) / 16 * 16;
  const int64_t all_queries = tile.num_kv_heads * s.num_queries;
  s.queries = scratch;
  s.scores = s.queries + all_queries * s.stride;
  s.widened = s.scores + all_queries * kBlockTokens;
  s.part = sums_at(s.widened + kBlockTokens * s.stride, all_queries, s.stride);
  s.positions = call.positions + tile.first_token;
  const int64_t heads = call.num_heads + 2 * call.num_kv_heads;
  for (int64_t n = 0; n < all_queries; ++n) {
    const int64_t token = tile.first_token + n % s.num_queries / s.group;
    const int64_t head = (tile.first_kv_head + n / s.num_queries) * s.group + n % s.group;
    float* query = s.queries + n * s.stride;
    rotate(call, call.qkv + (token * heads + head) * s.width, token, call.scale, query);
    for (int64_t i = s.width; i < s.stride; ++i) query[i] = 0.0f;
  }
  return s;
}

// Fills s.part with a segment of the tile's keys.
template <class Elements>
static void sum_segment(const Attention& call, const TileState& s, const QueryTile& tile, int64_t segment) {
  const int64_t all_queries = tile.num_kv_heads * s.num_queries, begin = segment * kSegmentTokens;
  clear(s.part, all_queries, s.stride);
  const int64_t end = tile.last_key + 1 < begin + kSegmentTokens ? tile.last_key + 1 : begin + kSegmentTokens;
  const int32_t* table = call.page_table + call.rows[tile.first_token] * call.max_pages;
  int64_t key = begin;
  if (tile.first_key > begin) {  // the start of the block that holds it
    const int64_t page_start = tile.first_key / call.page_tokens * call.page_tokens;
    const int64_t from = page_start > begin ? page_start : begin;
    key = from + (tile.first_key - from) / kBlockTokens * kBlockTokens;
  }
  while (key < end) {
    const int64_t page = table[key / call.page_tokens], offset = key % call.page_tokens;
    const int64_t in_page = call.page_tokens - offset, left = end - key;
    const int64_t block = in_page < kBlockTokens ? in_page : kBlockTokens;
    const int64_t head = page * 2 * call.num_kv_heads + tile.first_kv_head;
    attend_block<Elements>(call, s, tile.num_kv_heads, (head * call.page_tokens + offset) * call.head_dim, key,
                           left < block ? left : block);
    key += block;
  }
}

MAX_INLINE void sum_any_segment(const Attention& call, const TileState& s, const QueryTile& tile, int64_t segment) {
  call.pages_are_bf16 ? sum_segment<Bf16Elements>(call, s, tile, segment)
                      : sum_segment<FloatElements>(call, s, tile, segment);
}

// Nothing is summed up yet, but for the sink: a score of each head without a value.
MAX_INLINE void start_sums(const Attention& call, const QueryTile& tile, int64_t num_queries, int64_t stride,
                           const Sums& all) {
  clear(all, tile.num_kv_heads * num_queries, stride);
  const int64_t group = call.num_heads / call.num_kv_heads;
  for (int64_t n = 0; call.sinks != nullptr && n < tile.num_kv_heads * num_queries; ++n) {
    all.peaks[n] = call.sinks[(tile.first_kv_head + n / num_queries) * group + n % group];
    all.totals[n * kPartVector] = 1.0f;
  }
}

MAX_INLINE void merge(const Sums& part, int64_t queries, int64_t stride, const Sums& all) {
  for (int64_t n = 0; n < queries; ++n) {
    if (part.peaks[n] == -__builtin_inff()) continue;  // it has seen none of them
    const float peak = part.peaks[n] > all.peaks[n] ? part.peaks[n] : all.peaks[n];
    const Vec before = exponential(broadcast(all.peaks[n]) - peak), now = exponential(broadcast(part.peaks[n]) - peak);
    all.peaks[n] = peak;
    float* totals = all.totals + n * kPartVector;
    store(totals, load(totals) * before + load(part.totals + n * kPartVector) * now);
    float* sums = all.sums + n * stride;
    for (int64_t i = 0; i < stride; i += kLanes)
      store(sums + i, load(sums + i) * before + load(part.sums + n * stride + i) * now);
  }
}

MAX_INLINE void write_results(const Attention& call, const QueryTile& tile, int64_t num_queries, int64_t stride,
                              const Sums& all) {
  const int64_t group = call.num_heads / call.num_kv_heads;
  for (int64_t n = 0; n < tile.num_kv_heads * num_queries; ++n) {
    const int64_t token = tile.first_token + n % num_queries / group;
    const int64_t head = (tile.first_kv_head + n / num_queries) * group + n % group;
    const float share = 1.0f / sum_of(load(all.totals + n * kPartVector));
    float* out = call.out + (token * call.num_heads + head) * call.head_dim;
    // Adding 0 makes a zero positive: a masked weight may have turned its sign.
    for (int64_t i = 0; i < call.head_dim; ++i) out[i] = all.sums[n * stride + i] * share + 0.0f;
  }
}

// All segments of a tile; scratch: attention_scratch() floats.
static void attend(const Attention& call, const QueryTile& tile, float* scratch) {
  const TileState s = start_tile(call, tile, scratch);
  const int64_t queries = tile.num_kv_heads * s.num_queries;
  const Sums all = sums_at(s.part.peaks + queries, queries, s.stride);
  start_sums(call, tile, s.num_queries, s.stride, all);
  for (int64_t segment = tile.first_key / kSegmentTokens; segment <= tile.last_key / kSegmentTokens; ++segment) {
    sum_any_segment(call, s, tile, segment);
    merge(s.part, queries, s.stride, all);
  }
  write_results(call, tile, s.num_queries, s.stride, all);
}

// One segment of a tile, into a part of attention_part() floats.
static void attend_segment(const Attention& call, const QueryTile& tile, int64_t segment, float* scratch, float* part) {
  TileState s = start_tile(call, tile, scratch);
  s.part = sums_at(part, tile.num_kv_heads * s.num_queries, s.stride);
  sum_any_segment(call, s, tile, segment);
}

// The results of a tile from its parts, which lie `part_stride` floats apart.
static void merge_segments(const Attention& call, const QueryTile& tile, float* parts, int64_t part_stride,
                           float* scratch) {
  const int64_t num_queries = tile.num_tokens * (call.num_heads / call.num_kv_heads);
  const int64_t stride = (call.head_dim + 15) / 16 * 16, queries = tile.num_kv_heads * num_queries;
  const Sums all = sums_at(scratch, queries, stride);
  start_sums(call, tile, num_queries, stride, all);
  for (int64_t segment = tile.first_key / kSegmentTokens; segment <= tile.last_key / kSegmentTokens; ++segment) {
    merge(sums_at(parts, queries, stride), queries, stride, all);
    parts += part_stride;
  }
  write_results(call, tile, num_queries, stride, all);
}
