// Validates a step of attention, writes its keys and values, and cuts its queries into tiles for the threads.
#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "isa.h"
#include "scratch.h"
#include "thread_pool.h"

namespace max_kernels {
namespace {

constexpr int64_t kMaxHeadDim = 1024;

std::string shape_problem(const Attention& call) {
  if (call.num_tokens < 0 || call.num_kv_heads < 1 || call.num_heads < 1 || call.num_heads % call.num_kv_heads != 0) {
    return "attention needs a whole number of query heads per kv head";
  }
  if (call.head_dim < 1 || call.head_dim > kMaxHeadDim) return "attention heads have 1 to 1024 dimensions";
  if (call.rotary_dim < 0 || call.rotary_dim % 2 != 0 || call.rotary_dim > call.head_dim) {
    return "the rotated dimensions are no even part of a head";
  }
  if (call.window < 0 || !(call.softcap >= 0)) return "a window and a softcap are not negative";
  if (call.page_tokens < 1 || call.num_pages < 1) return "attention needs pages";
  if (kernels() == nullptr) return "MAX_KERNELS_ISA names an instruction set that this CPU lacks";
  return "";
}

// The tokens from `first` on that are of one row.
int64_t tokens_of_row(const Attention& call, int64_t first) {
  int64_t end = first + 1;
  while (end < call.num_tokens && call.rows[end] == call.rows[first]) ++end;
  return end - first;
}

// The first and the last key that any of some tokens of a row sees.
std::pair<int64_t, int64_t> keys_seen(const Attention& call, int64_t first_token, int64_t num_tokens) {
  const auto [lowest, highest] =
      std::minmax_element(call.positions + first_token, call.positions + first_token + num_tokens);
  const int64_t first = call.window > 0 ? std::max<int64_t>(0, *lowest - call.window + 1) : 0;
  return {first, *highest};
}

// Indices come from the scheduler; one out of range would read or write somebody else's memory.
std::string index_problem(const Attention& call) {
  const auto at = [](const char* what, int64_t token) { return what + std::to_string(token) + " is out of range"; };
  for (int64_t first = 0; first < call.num_tokens; first += tokens_of_row(call, first)) {
    if (call.rows[first] < 0) continue;
    if (call.rows[first] >= call.max_rows) return at("the row of token ", first);
    const int64_t count = tokens_of_row(call, first);
    for (int64_t t = first; t < first + count; ++t) {
      if (call.slots[t] < 0 || call.slots[t] / call.page_tokens >= call.num_pages) return at("the slot of token ", t);
      if (call.positions[t] < 0 || call.positions[t] / call.page_tokens >= call.max_pages)
        return at("the position of token ", t);
    }
    const int32_t* table = call.page_table + call.rows[first] * call.max_pages;
    const auto [first_key, last_key] = keys_seen(call, first, count);
    for (int64_t p = first_key / call.page_tokens; p <= last_key / call.page_tokens; ++p) {
      if (table[p] < 0 || table[p] >= call.num_pages) return at("a page of token ", first + count - 1);
    }
  }
  return "";
}

int64_t group_size(const Attention& call) { return call.num_heads / call.num_kv_heads; }

int64_t num_segments(const QueryTile& tile) {
  return tile.last_key / kSegmentTokens - tile.first_key / kSegmentTokens + 1;
}

std::vector<QueryTile> cut_into_tiles(const Attention& call) {
  const int64_t most = std::max<int64_t>(1, kTileQueries / group_size(call));
  std::vector<QueryTile> tokens;
  for (int64_t t = 0; t < call.num_tokens;) {
    const int64_t count = std::min(most, tokens_of_row(call, t));
    if (call.rows[t] >= 0) {
      const auto [first_key, last_key] = keys_seen(call, t, count);
      tokens.push_back({t, count, 0, call.num_kv_heads, first_key, last_key});
    }
    t += count;
  }
  std::vector<QueryTile> tiles;
  for (QueryTile tile : tokens) {
    // Few queries are bound by the pages' bandwidth: they take several heads, whose keys and then values are one stream.
    const int64_t fitting = std::max<int64_t>(1, kTileQueries / (tile.num_tokens * group_size(call)));
    const int64_t units = static_cast<int64_t>(tokens.size()) * num_segments(tile);
    const int64_t heads = std::clamp<int64_t>(call.num_kv_heads * units / num_threads(), 1, fitting);
    for (int64_t h = 0; h < call.num_kv_heads; h += heads) {
      tile.first_kv_head = h;
      tile.num_kv_heads = std::min(heads, call.num_kv_heads - h);
      tiles.push_back(tile);
    }
  }
  return tiles;
}

float* scratch_of(const Attention& call) {
  static thread_local Scratch scratch;
  return static_cast<float*>(scratch.at_least(attention_scratch(call) * sizeof(float)));
}

// Whole tiles. The last ones of a prompt see the most keys: started first, none of them is left over at the end.
void attend_tiles(const Attention& call, const std::vector<QueryTile>& tiles) {
  const int64_t num_tiles = static_cast<int64_t>(tiles.size());
  parallel_for(num_tiles, [&](int64_t i) { kernels()->attend(call, tiles[num_tiles - 1 - i], scratch_of(call)); });
}

// Fewer tiles than threads can share: each segment of a tile on its own, with the same result.
void attend_segments(const Attention& call, const std::vector<QueryTile>& tiles) {
  std::vector<std::pair<int64_t, int64_t>> units;  // a tile and a segment
  std::vector<int64_t> first_units;
  for (size_t i = 0; i < tiles.size(); ++i) {
    first_units.push_back(static_cast<int64_t>(units.size()));
    const int64_t first = tiles[i].first_key / kSegmentTokens;
    for (int64_t s = 0; s < num_segments(tiles[i]); ++s) units.push_back({i, first + s});
  }
  static thread_local Scratch scratch;
  const int64_t stride = attention_part(call);
  float* parts = static_cast<float*>(scratch.at_least(stride * units.size() * sizeof(float)));
  parallel_for(static_cast<int64_t>(units.size()), [&, parts](int64_t i) {
    kernels()->attend_segment(call, tiles[units[i].first], units[i].second, scratch_of(call), parts + i * stride);
  });
  parallel_for(static_cast<int64_t>(tiles.size()), [&, parts](int64_t i) {
    kernels()->merge_segments(call, tiles[i], parts + first_units[i] * stride, stride, scratch_of(call));
  });
}

// Tokens that one thread writes, from `first` on. Of a prompt all whose keys may share a cache line: two threads that
// write to the same lines wait for each other.
int64_t tokens_to_write(const Attention& call, int64_t first) {
  constexpr int64_t kTokensPerChunk = 8, kSharing = 32;
  int64_t end = std::min(first + kTokensPerChunk, call.num_tokens);
  const auto follows = [&](int64_t t) { return call.slots[t] - int64_t{1} == call.slots[t - 1]; };
  while (end < call.num_tokens && follows(end) && call.slots[end] % kSharing != 0) ++end;
  return end - first;
}

void write_tokens(const Attention& call, int64_t first, int64_t end) {
  const int64_t width = call.num_heads * call.head_dim;
  for (int64_t count; first < end; first += count) {
    const bool padding = call.rows[first] < 0;
    for (count = 1; first + count < end && (call.rows[first + count] < 0) == padding;) ++count;
    if (padding) {
      std::memset(call.out + first * width, 0, count * width * sizeof(float));
    } else {
      kernels()->write_tokens(call, first, first + count);
    }
  }
}

void write_all_tokens(const Attention& call) {
  std::vector<int64_t> bounds = {0};
  while (bounds.back() < call.num_tokens) bounds.push_back(bounds.back() + tokens_to_write(call, bounds.back()));
  parallel_for(static_cast<int64_t>(bounds.size()) - 1,
               [&](int64_t i) { write_tokens(call, bounds[i], bounds[i + 1]); });
}

int64_t stride_of(const Attention& call) { return (call.head_dim + 15) / 16 * 16; }
int64_t most_queries(const Attention& call) { return std::max(kTileQueries, group_size(call)); }

}  // namespace

int64_t attention_part(const Attention& call) { return most_queries(call) * (stride_of(call) + kPartVector + 1); }

int64_t attention_scratch(const Attention& call) {
  const int64_t queries_and_scores = most_queries(call) * (stride_of(call) + kBlockTokens);
  return queries_and_scores + kBlockTokens * stride_of(call) + 2 * attention_part(call);
}

std::string attention(const Attention& call) {
  std::string wrong = shape_problem(call);
  if (wrong.empty()) wrong = index_problem(call);
  if (!wrong.empty()) return wrong;
  write_all_tokens(call);
  const std::vector<QueryTile> tiles = cut_into_tiles(call);
  const bool some_are_long =
      std::any_of(tiles.begin(), tiles.end(), [](const QueryTile& tile) { return num_segments(tile) > 1; });
  const bool are_few = static_cast<int64_t>(tiles.size()) < 4 * num_threads();
  num_threads() > 1 && some_are_long && are_few ? attend_segments(call, tiles) : attend_tiles(call, tiles);
  return "";
}

}  // namespace max_kernels
