// Validates a step of attention, writes its keys and values, and cuts its queries into tiles for the threads.
#include <algorithm>
#include <cstring>
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
  if (call.page_tokens < 1 || call.num_pages < 1) return "attention needs pages";
  if (kernels() == nullptr) return "MAX_KERNELS_ISA names an instruction set that this CPU lacks";
  return "";
}

// Indices come from the scheduler; one out of range would read or write somebody else's memory.
std::string index_problem(const Attention& call) {
  const auto at = [](const char* what, int64_t token) { return what + std::to_string(token) + " is out of range"; };
  for (int64_t t = 0; t < call.num_tokens; ++t) {
    if (call.rows[t] < 0) continue;
    if (call.rows[t] >= call.max_rows) return at("the row of token ", t);
    if (call.slots[t] < 0 || call.slots[t] / call.page_tokens >= call.num_pages) return at("the slot of token ", t);
    if (call.positions[t] < 0 || call.positions[t] / call.page_tokens >= call.max_pages)
      return at("the position of token ", t);
    const bool last_of_row = t + 1 == call.num_tokens || call.rows[t + 1] != call.rows[t];
    const int32_t* table = call.page_table + call.rows[t] * call.max_pages;
    for (int64_t p = last_of_row ? 0 : call.positions[t] / call.page_tokens;
         p <= call.positions[t] / call.page_tokens; ++p) {
      if (table[p] < 0 || table[p] >= call.num_pages) return at("a page of token ", t);
    }
  }
  return "";
}

int64_t group_size(const Attention& call) { return call.num_heads / call.num_kv_heads; }

// Few queries are bound by the pages' bandwidth: they take several heads, whose keys and then values are one stream.
int64_t heads_of_tile(const Attention& call, int64_t num_queries, int64_t num_tiles) {
  const int64_t fitting = std::max<int64_t>(1, kTileQueries / num_queries);
  const int64_t for_all_threads = call.num_kv_heads * num_tiles / num_threads();
  return std::clamp<int64_t>(for_all_threads, 1, fitting);
}

std::vector<QueryTile> cut_into_tiles(const Attention& call) {
  const int64_t most = std::max<int64_t>(1, kTileQueries / group_size(call));
  std::vector<QueryTile> tokens;
  for (int64_t t = 0; t < call.num_tokens;) {
    int64_t count = 1;
    while (count < most && t + count < call.num_tokens && call.rows[t + count] == call.rows[t]) ++count;
    if (call.rows[t] >= 0) tokens.push_back({t, count, 0, call.num_kv_heads});
    t += count;
  }
  std::vector<QueryTile> tiles;
  for (const QueryTile& tile : tokens) {
    const int64_t heads =
        heads_of_tile(call, tile.num_tokens * group_size(call), static_cast<int64_t>(tokens.size()));
    for (int64_t h = 0; h < call.num_kv_heads; h += heads) {
      tiles.push_back({tile.first_token, tile.num_tokens, h, std::min(heads, call.num_kv_heads - h)});
    }
  }
  return tiles;
}

}  // namespace

int64_t attention_scratch(const Attention& call) {
  const int64_t queries = std::max(kTileQueries, group_size(call));
  const int64_t stride = (call.head_dim + 15) / 16 * 16;
  const int64_t widest_vector = 16;
  return queries * (2 * stride + kBlockTokens + widest_vector + 1) + 2 * kBlockTokens * stride;
}

std::string attention(const Attention& call) {
  std::string wrong = shape_problem(call);
  if (wrong.empty()) wrong = index_problem(call);
  if (!wrong.empty()) return wrong;
  const Kernels& isa = *kernels();
  constexpr int64_t kTokensPerChunk = 8;
  parallel_for((call.num_tokens + kTokensPerChunk - 1) / kTokensPerChunk, [&](int64_t i) {
    for (int64_t t = i * kTokensPerChunk; t < std::min((i + 1) * kTokensPerChunk, call.num_tokens); ++t) {
      const int64_t width = call.num_heads * call.head_dim;
      if (call.rows[t] >= 0) {
        isa.write_token(call, t);
      } else {
        std::memset(call.out + t * width, 0, width * sizeof(float));
      }
    }
  });
  const std::vector<QueryTile> tiles = cut_into_tiles(call);
  const int64_t num_tiles = static_cast<int64_t>(tiles.size());
  // The last tiles of a prompt see the most keys: started first, none of them is left over at the end.
  parallel_for(num_tiles, [&](int64_t i) {
    static thread_local Scratch scratch;
    float* memory = static_cast<float*>(scratch.at_least(attention_scratch(call) * sizeof(float)));
    isa.attend(call, tiles[num_tiles - 1 - i], memory);
  });
  return "";
}

}  // namespace max_kernels
