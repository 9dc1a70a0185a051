// Attention of a few queries over the pages of some kv heads, with an online softmax. Included as vector.h is.
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
  float *queries, *scores, *laid;             // laid: a block's keys or values as products take them
  Sums part;                                  // of one segment
  const int32_t* positions;                   // of the tile's tokens
};

// Keys that lie together in a page, one per lane, and their values.
struct Block {
  int64_t first_key, count;
  int64_t keys, values;  // where those of the tile's first head begin, in elements of the pages
  int64_t stride, left;  // tokens of the block as it lies in the page, and those from the first key on
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

// Takes one query's scores with the keys [begin, end) of a block and gives its highest with `softcap` in force.
MAX_INLINE Vec highest_score(const Attention& call, float* scores, int64_t begin, int64_t end) {
  Vec highest = broadcast(-__builtin_inff());
  for (int64_t k = 0; k < end; k += kLanes) {
    if (call.softcap > 0) {
      store(scores + k, hyperbolic_tangent(load(scores + k) * (1.0f / call.softcap)) * call.softcap);
    }
    Vec visible = load(scores + k);
    if (k < begin || k + kLanes > end) visible = lanes_between(begin - k, end - k) ? visible : highest;
    highest = visible > highest ? visible : highest;
  }
  return highest;
}

// Turns the scores of one query with a block's keys into weights, against its peak so far.
template <class Elements>
MAX_INLINE void weigh(const Attention& call, const TileState& s, int64_t query, const KeysSeen& seen) {
  float* scores = s.scores + query * kBlockTokens;
  float* totals = s.part.totals + query * kPartVector;
  const float of_block = highest_of(highest_score(call, scores, seen.begin, seen.end));
  const float peak = of_block > s.part.peaks[query] ? of_block : s.part.peaks[query];
  if (peak > s.part.peaks[query]) {
    const Vec shrink = exponential(broadcast(s.part.peaks[query]) - peak);
    s.part.peaks[query] = peak;
    store(totals, load(totals) * shrink);
    float* sums = s.part.sums + query * s.stride;
    for (int64_t i = 0; i < s.stride; i += kLanes) store(sums + i, load(sums + i) * shrink);
  }
  store(totals, Elements::weigh(scores, peak, seen, load(totals)));
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

// The keys of a block that any of some queries sees.
MAX_INLINE int64_t keys_seen(const TileState& s, int64_t query, int64_t rows, const Block& block) {
  int64_t most = 0;
  for (int64_t token = query / s.group; token <= (query + rows - 1) / s.group; ++token) {
    const int64_t seen = s.positions[token] + 1 - block.first_key;
    most = seen > most ? seen : most;
  }
  return most < block.count ? most : block.count;
}

// Calls use(query, rows, seen) for a few queries at a time, with the keys of the block that they see.
template <class Use>
MAX_INLINE void for_rows(const TileState& s, const Block& block, const Use& use) {
  for (int64_t n = 0; n < s.num_queries; n += kAttendRows) {
    const int64_t rows = s.num_queries - n < kAttendRows ? s.num_queries - n : kAttendRows;
    const int64_t seen = keys_seen(s, n, rows, block);
    if (seen > 0) use(n, rows, seen);
  }
}

// The weights of a head's queries for the keys of a block.
template <class Elements>
static void weigh_keys(const Attention& call, const TileState& s, const typename Elements::Type* in,
                       const Block& block) {
  const int64_t whole = (block.count + kLanes - 1) / kLanes * kLanes;
  const RowsOfPage given{s.width, whole < block.left ? whole : block.left, block.stride};
  with_rows<Elements>(in, given, s.num_queries, s.laid,
                      [&](auto elements, const auto* keys, int64_t stride, bool there) {
    for_rows(s, block, [&](int64_t query, int64_t rows, int64_t seen) {
      float* scores = s.scores + query * kBlockTokens;
      const TileShape t{s.queries + query * s.stride, s.stride, scores, kBlockTokens, s.width, false};
      const int64_t columns = (seen + kLanes - 1) / kLanes * kLanes;
      multiply_rows<decltype(elements)>(t, keys, stride, rows, columns, there && query == 0);
      for (int64_t n = query; n < query + rows; ++n) {
        const int64_t end = s.positions[n / s.group] + 1 - block.first_key;
        const int64_t begin = call.window > 0 ? end - call.window : 0;
        weigh<Elements>(call, s, n, {begin, end < 0 ? 0 : end < block.count ? end : block.count, columns});
      }
    });
  });
}

// Adds the weighted values of a block to the sums of a head's queries.
template <class Elements>
static void add_values(const TileState& s, const typename Elements::Type* in, const Block& block) {
  const RowsOfPage given{block.count, s.width, s.width};
  with_rows<Elements>(in, given, s.num_queries, s.laid,
                      [&](auto elements, const auto* values, int64_t stride, bool there) {
    for_rows(s, block, [&](int64_t query, int64_t rows, int64_t seen) {
      float* sums = s.part.sums + query * s.stride;
      const TileShape t{s.scores + query * kBlockTokens, kBlockTokens, sums, s.stride, seen, true};
      multiply_rows<decltype(elements)>(t, values, stride, rows, stride, there && query == 0);
    });
  });
}

// One block of keys for `num_heads` heads.
template <class Elements>
static void attend_block(const Attention& call, const TileState& first, int64_t num_heads, const Block& block) {
  const int64_t head_size = call.page_tokens * call.head_dim;
  const auto* pages = static_cast<const typename Elements::Type*>(call.pages);
  for (int64_t h = 0; h < num_heads; ++h)
    weigh_keys<Elements>(call, of_head(first, h), pages + block.keys + h * head_size, block);
  for (int64_t h = 0; h < num_heads; ++h)
    add_values<Elements>(of_head(first, h), pages + block.values + h * head_size, block);
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
  s.laid = s.scores + all_queries * kBlockTokens;
  s.part = sums_at(s.laid + kBlockTokens * s.stride, all_queries, s.stride);
  s.positions = call.positions + tile.first_token;
  const int64_t heads = call.num_heads + 2 * call.num_kv_heads;
  const auto token_of = [&](int64_t n) { return tile.first_token + n % s.num_queries / s.group; };
  const auto given = [&](int64_t n) {
    const int64_t head = (tile.first_kv_head + n / s.num_queries) * s.group + n % s.group;
    return call.qkv + (token_of(n) * heads + head) * s.width;
  };
  for (int64_t n = 0; n < all_queries; ++n) prefetch_lines_at<false>(given(n), s.width * 4);
  for (int64_t n = 0; n < all_queries; ++n) {
    float* query = s.queries + n * s.stride;
    rotate(call, given(n), token_of(n), call.scale, query);
    for (int64_t i = s.width; i < s.stride; ++i) query[i] = 0.0f;
    if (call.pages_are_bf16) HalfElements::round_query(query, s.stride);
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
    const int64_t start = tile.first_key - tile.first_key % call.page_tokens % kBlockTokens;
    key = start > begin ? start : begin;
  }
  while (key < end) {
    const int64_t page = table[key / call.page_tokens], offset = key % call.page_tokens;
    const int64_t head = page * 2 * call.num_kv_heads + tile.first_kv_head;
    const int64_t head_size = call.page_tokens * call.head_dim;
    Block block;
    block.first_key = key;
    block.stride = block_tokens(call, offset);
    block.left = block.stride - offset % kBlockTokens;
    block.count = end - key < block.left ? end - key : block.left;
    block.keys = head * head_size + key_in_head(call, offset);
    block.values = (head + call.num_kv_heads) * head_size + offset * call.head_dim;
    attend_block<Elements>(call, s, tile.num_kv_heads, block);
    key += block.count;
  }
}

MAX_INLINE void sum_any_segment(const Attention& call, const TileState& s, const QueryTile& tile, int64_t segment) {
  call.pages_are_bf16 ? sum_segment<HalfElements>(call, s, tile, segment)
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
  const auto result = [&](int64_t n) {
    const int64_t token = tile.first_token + n % num_queries / group;
    const int64_t head = (tile.first_kv_head + n / num_queries) * group + n % group;
    return call.out + (token * call.num_heads + head) * call.head_dim;
  };
  for (int64_t n = 0; n < tile.num_kv_heads * num_queries; ++n) prefetch_lines_at<true>(result(n), call.head_dim * 4);
  for (int64_t n = 0; n < tile.num_kv_heads * num_queries; ++n) {
    const float share = 1.0f / sum_of(load(all.totals + n * kPartVector));
    float* out = result(n);
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
