// Runs the kernels without Python or XLA, so that sanitizers see nothing but them. Exits with the failures' number.
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "isa.h"
#include "lazy_zeros.h"
#include "thread_pool.h"

using namespace max_kernels;

namespace {

int failures = 0;

void expect(bool holds, const char* what, const char* isa) {
  if (holds) return;
  ++failures;
  std::fprintf(stderr, "FAILED: %s (%s)\n", what, isa);
}

// Exactly as long as asked for, on the heap: a sanitizer sees the first element beyond.
using Floats = std::vector<float>;
Floats random_floats(int64_t count, int seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal;
  Floats values(count);
  for (float& value : values) value = normal(generator);
  return values;
}

Floats multiply(Encoding encoding, Epilogue epilogue, const Floats& x, const Floats& w, int64_t inputs, int64_t outputs) {
  std::vector<uint8_t> packed(packed_bytes(encoding, epilogue, inputs, outputs));
  const auto put = [&](Columns columns, int64_t offset) {
    return pack({encoding, columns, Source::kF32, w.data() + offset, 1, inputs, inputs, outputs, 0, outputs, packed.data()});
  };
  const bool gated = is_gated(epilogue);
  std::string problem = put(gated ? Columns::kGate : Columns::kPlain, 0);
  if (gated && problem.empty()) problem = put(Columns::kUp, inputs * outputs);
  const int64_t rows = static_cast<int64_t>(x.size()) / inputs;
  Floats y(rows * outputs, NAN);
  const Floats bias(outputs, 0.5f);
  if (problem.empty()) {
    problem = matmul({encoding, epilogue, x.data(), packed.data(), bias.data(), y.data(), rows, inputs, outputs,
                      static_cast<int64_t>(packed.size())});
  }
  expect(problem.empty(), problem.c_str(), kernels()->name);
  return y;
}

double product(const Floats& x, const Floats& w, int64_t inputs, int64_t row, int64_t column) {
  double sum = 0;
  for (int64_t k = 0; k < inputs; ++k) sum += double(x[row * inputs + k]) * w[column * inputs + k];
  return sum;
}

double activated(Epilogue epilogue, double gate) {
  if (epilogue == Epilogue::kSwiglu) return gate / (1 + std::exp(-gate));
  if (epilogue == Epilogue::kGegluErf) return gate / 2 * std::erfc(-gate / std::sqrt(2.0));
  return gate / 2 * (1 + std::tanh(std::sqrt(2 / M_PI) * (gate + 0.044715 * gate * gate * gate)));
}

// How far a product of normal numbers may be off, in units of its standard deviation: what rounding the weights does.
double tolerance_of(Encoding encoding) {
  constexpr double tolerances[kNumEncodings] = {1e-5, 0.03, 0.06, 0.6, 0.5, 0.12};
  return tolerances[static_cast<int>(encoding)];
}

void check_matmul(Encoding encoding, int64_t rows, int64_t inputs, int64_t outputs) {
  const Floats x = random_floats(rows * inputs, 1), w = random_floats(2 * inputs * outputs, 2);
  const double deviation = std::sqrt(static_cast<double>(inputs)), tolerance = tolerance_of(encoding) * deviation;
  for (int kind = 0; kind < kNumEpilogues; ++kind) {
    const Epilogue epilogue = static_cast<Epilogue>(kind);
    const Floats y = multiply(encoding, epilogue, x, w, inputs, outputs);
    bool close = true;
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < outputs; ++c) {
        double want = product(x, w, inputs, r, c), off = tolerance;
        if (epilogue == Epilogue::kBias) want += 0.5;
        if (is_gated(epilogue)) {
          const double up = product(x, w, inputs, r, outputs + c);
          off = tolerance * (2 * std::abs(want) + 2 * std::abs(up) + tolerance);
          want = activated(epilogue, want) * up;
        }
        close &= std::abs(y[r * outputs + c] - want) <= off + 1e-4;  // false for NaN
      }
    }
    expect(close, "a matmul is close to float64", kernels()->name);
  }
}

// Blocks that were made of elements become the same panels as the elements; the last block ends where its memory does.
void check_blocks(Encoding encoding, int64_t inputs, int64_t outputs) {
  const Floats w = random_floats(inputs * outputs, 10);
  const BlockSize size = block_size(encoding);
  std::vector<uint8_t> blocks(inputs * outputs / size.inputs * size.bytes);
  std::string problem = quantize(encoding, w.data(), inputs * outputs, blocks.data());
  std::vector<uint8_t> of_blocks(packed_bytes(encoding, Epilogue::kNone, inputs, outputs)), of_elements(of_blocks);
  const auto put = [&](Source kind, const void* source, std::vector<uint8_t>& packed) {
    problem += pack({encoding, Columns::kPlain, kind, source, 1, inputs, inputs, outputs, 0, outputs, packed.data()});
  };
  put(Source::kBlocks, blocks.data(), of_blocks);
  put(Source::kF32, w.data(), of_elements);
  expect(problem.empty(), problem.c_str(), kernels()->name);
  expect(of_blocks == of_elements, "blocks are packed as the elements they were made of", kernels()->name);
}

// What is looked up is what the matmul of a unit vector gives, and nothing beyond the packed bytes is read.
void check_embedding(Encoding encoding, int64_t inputs, int64_t outputs) {
  const Floats w = random_floats(inputs * outputs, 9);
  std::vector<uint8_t> packed(packed_bytes(encoding, Epilogue::kNone, inputs, outputs));
  std::string problem = pack({encoding, Columns::kPlain, Source::kF32, w.data(), 1, inputs, inputs, outputs, 0, outputs,
                              packed.data()});
  std::vector<int32_t> ids(20, static_cast<int32_t>(outputs));
  for (int64_t i = 0; i < 18; ++i) ids[i] = static_cast<int32_t>(i * (outputs - 1) / 17);
  ids[19] = -1;
  Floats rows(20 * inputs, 7.0f);
  Embedding call{encoding, ids.data(), packed.data(), rows.data(), 20, inputs, outputs,
                 static_cast<int64_t>(packed.size())};
  if (problem.empty()) problem = embed(call);
  expect(problem.empty(), problem.c_str(), kernels()->name);
  bool close = true;
  for (int64_t i = 0; i < 20; ++i) {
    for (int64_t k = 0; k < inputs; ++k) {
      const float found = rows[i * inputs + k];
      close &= i < 18 ? std::abs(found - w[ids[i] * inputs + k]) <= 5 * tolerance_of(encoding) : std::isnan(found);
    }
  }
  expect(close, "an embedding's rows are those that were packed", kernels()->name);
  call.weight_bytes -= 1;
  expect(!embed(call).empty(), "an embedding of another size is refused", kernels()->name);
}

struct Step {
  int64_t heads = 4, kv_heads = 2, dim, page_tokens, num_pages = 9, max_pages = 4;
  std::vector<int32_t> rows, positions, slots, table{1, 2, 3, 4, 5, 6, 7, 8};
  Floats qkv, cos, sin, out;
  std::vector<float> pages;
  int64_t window;
  float softcap = 5.0f;
  Floats sinks{0.5f, -1.0f, 2.0f, 0.0f};

  explicit Step(int64_t head_dim, int64_t page_size, int64_t seen) : dim(head_dim), page_tokens(page_size), window(seen) {
    // Up to 17 tokens of a prompt that fills all but three of its pages', a token of another row, and one of padding.
    const int32_t end = static_cast<int32_t>(max_pages * page_tokens - 3), first = std::max(0, end - 17);
    for (int32_t t = first; t < end; ++t) add(0, t);
    add(1, 0);
    rows.push_back(-1), positions.push_back(0), slots.push_back(0);
    const int64_t tokens = static_cast<int64_t>(rows.size());
    qkv = random_floats(tokens * (heads + 2 * kv_heads) * dim, 3);
    cos.assign(tokens * dim / 2, 0.8f), sin.assign(tokens * dim / 2, 0.6f);
    out.assign(tokens * heads * dim, NAN);
    pages.assign(num_pages * 2 * kv_heads * page_tokens * dim, first == 0 ? NAN : 0.5f);
  }

  void add(int32_t row, int32_t position) {
    rows.push_back(row), positions.push_back(position);
    const int64_t page = table[row * max_pages + position / page_tokens];
    slots.push_back(static_cast<int32_t>(page * page_tokens + position % page_tokens));
  }

  std::string run(bool bf16) {
    return attention({qkv.data(), cos.data(), sin.data(), table.data(), rows.data(), positions.data(), slots.data(),
                      pages.data(), out.data(), static_cast<int64_t>(rows.size()), heads, kv_heads, dim, dim / 2 * 2,
                      num_pages, page_tokens, 2, max_pages, bf16, 0.25f, softcap, window, sinks.data()});
  }
};

void check_attention(int64_t dim, int64_t page_tokens, int64_t window, bool bf16) {
  Step step(dim, page_tokens, window);
  const std::string problem = step.run(bf16);
  expect(problem.empty(), problem.c_str(), kernels()->name);
  bool finite = true;
  for (float value : step.out) finite &= std::isfinite(value);
  expect(finite, "attention reads nothing that was not written", kernels()->name);
  step.table[1] = 9;
  expect(!step.run(bf16).empty(), "a page out of range is refused", kernels()->name);
}

// Two layers with equal weights, in one call and operation by operation.
void check_decoder(Encoding encoding, int64_t tokens) {
  const int64_t width = 256, mlp = 256, heads = 4, dim = 64, tokens_of_page = 4;
  const auto packed = [&](Epilogue epilogue, int64_t inputs, int64_t outputs, int seed) {
    std::vector<uint8_t> bytes(packed_bytes(encoding, epilogue, inputs, outputs));
    for (int part = 0; part < (is_gated(epilogue) ? 2 : 1); ++part) {
      const Floats w = random_floats(inputs * outputs, seed + part);
      const Columns columns = !is_gated(epilogue) ? Columns::kPlain : part == 0 ? Columns::kGate : Columns::kUp;
      const std::string problem =
          pack({encoding, columns, Source::kF32, w.data(), 1, inputs, inputs, outputs, 0, outputs, bytes.data()});
      expect(problem.empty(), problem.c_str(), kernels()->name);
    }
    return bytes;
  };
  const auto qkv = packed(Epilogue::kNone, width, 2 * width, 1), o = packed(Epilogue::kNone, width, width, 2);
  const auto gate_up = packed(Epilogue::kSwiglu, width, mlp, 3), down = packed(Epilogue::kNone, mlp, width, 5);
  const auto matrix = [&](const std::vector<uint8_t>& bytes) {
    return Matrix{encoding, bytes.data(), static_cast<int64_t>(bytes.size())};
  };
  const Floats norm = random_floats(width, 6), x = random_floats(tokens * width, 7);
  const Floats cos(tokens * dim / 2, 0.8f), sin(tokens * dim / 2, 0.6f);
  std::vector<int32_t> table(tokens), rows(tokens), positions(tokens, 0), slots(tokens);
  for (int32_t t = 0; t < tokens; ++t) {
    table[t] = rows[t] = t, slots[t] = t * static_cast<int32_t>(tokens_of_page);
  }
  Floats pages(2 * tokens * 2 * 2 * tokens_of_page * dim, 0.5f), found(tokens * width, NAN), want = x;
  const int64_t of_layer = static_cast<int64_t>(pages.size()) / 2;
  Attention attends{nullptr, cos.data(), sin.data(), table.data(), rows.data(), positions.data(), slots.data(), nullptr,
                    nullptr, tokens, heads, 2, dim, dim, tokens, tokens_of_page, tokens, 1, false, 0.125f, 0, 0, nullptr};
  std::vector<DecoderLayer> layers(2, {norm.data(), matrix(qkv), matrix(o), norm.data(), matrix(gate_up), matrix(down),
                                       pages.data()});
  layers[1].pages = pages.data() + of_layer;
  DecoderLayers call{layers.data(), 2, x.data(), found.data(), attends, width, mlp, Epilogue::kSwiglu, 1e-5f};
  std::string problem = decode_layers(call);
  Floats h(tokens * width), wide(tokens * 2 * width), out(tokens * width), delta(tokens * width);
  const auto product = [&](const std::vector<uint8_t>& w, const Floats& in, Floats& y, int64_t outputs, Epilogue epilogue) {
    problem += matmul({encoding, epilogue, in.data(), w.data(), nullptr, y.data(), tokens, width, outputs,
                       static_cast<int64_t>(w.size())});
  };
  const auto normed = [&] {
    problem += rms_norm({want.data(), nullptr, norm.data(), nullptr, h.data(), tokens, width, 1e-5f});
  };
  const auto add = [&] {
    for (int64_t i = 0; i < tokens * width; ++i) want[i] += delta[i];
  };
  for (int layer = 0; layer < 2; ++layer) {
    normed();
    product(qkv, h, wide, 2 * width, Epilogue::kNone);
    attends.qkv = wide.data(), attends.pages = pages.data() + layer * of_layer, attends.out = out.data();
    problem += attention(attends);
    product(o, out, delta, width, Epilogue::kNone);
    add(), normed();
    product(gate_up, h, out, mlp, Epilogue::kSwiglu);
    product(down, out, delta, width, Epilogue::kNone);
    add();
  }
  expect(problem.empty(), problem.c_str(), kernels()->name);
  expect(found == want, "layers in one call have the bits of their operations", kernels()->name);
  layers[1].down.weight_bytes -= 1;
  expect(!decode_layers(call).empty(), "a layer with a matrix of another size is refused", kernels()->name);
}

void check_lazy_zeros() {
  for (int64_t first : {0, 1, 4096}) {
    std::vector<uint8_t> memory(3 * 4096 + 7, 5);
    make_lazy_zeros(memory.data() + first, 2 * 4096 + 3);
    const auto zeros = std::count(memory.begin(), memory.end(), 0);
    expect(zeros == 2 * 4096 + 3 && memory[first] == 0, "zeros go no further than asked for", "any");
  }
}

void check_argmax() {
  for (int64_t columns : {1, 17, 1500}) {
    Floats x = random_floats(3 * columns, 4);
    x[columns + columns / 2] = 9, x[2 * columns + columns / 2] = NAN;
    int32_t found[3];
    const std::string problem = argmax(x.data(), 3, columns, found);
    expect(problem.empty() && found[1] == columns / 2 && found[2] == -1, "argmax", kernels()->name);
  }
}

void check_norm() {
  for (int64_t width : {1, 17, 300}) {
    Floats x = random_floats(40 * width, 6), delta = random_floats(40 * width, 7), weight = random_floats(width, 8);
    Floats y(40 * width, NAN), sum(40 * width, NAN);
    bool close = rms_norm({x.data(), delta.data(), weight.data(), sum.data(), y.data(), 40, width, 1e-5f}).empty();
    for (int64_t r = 0; r < 40; ++r) {
      double squares = 0;
      for (int64_t i = r * width; i < (r + 1) * width; ++i) squares += std::pow(double(x[i]) + delta[i], 2);
      const double scale = 1 / std::sqrt(squares / width + 1e-5);
      for (int64_t i = 0; i < width; ++i) {
        const int64_t at = r * width + i;
        close &= sum[at] == x[at] + delta[at] && std::abs(y[at] - sum[at] * scale * weight[i]) < 1e-5;
      }
    }
    expect(close, "norm", kernels()->name);
  }
}

void check_logprobs() {
  for (int64_t columns : {1, 17, 1500}) {
    const int64_t top = columns < 20 ? columns : 20;
    const Floats x = random_floats(2 * columns, 5);
    const std::vector<int32_t> ids{0, static_cast<int32_t>(columns - 1)};
    Floats chosen(2, NAN), best(2 * top, NAN);
    std::vector<int32_t> best_ids(2 * top, -1);
    const std::string problem =
        logprobs({x.data(), ids.data(), chosen.data(), best_ids.data(), best.data(), 2, columns, top});
    bool close = problem.empty();
    for (int64_t r = 0; r < 2; ++r) {
      double sum = 0;
      for (int64_t i = 0; i < columns; ++i) sum += std::exp(double(x[r * columns + i]));
      close &= std::abs(chosen[r] - (x[r * columns + ids[r]] - std::log(sum))) < 1e-5;
      for (int64_t i = 0; i < top; ++i) {
        close &= std::abs(best[r * top + i] - (x[r * columns + best_ids[r * top + i]] - std::log(sum))) < 1e-5;
        close &= i == 0 || best[r * top + i] <= best[r * top + i - 1];
      }
    }
    expect(close, "log probabilities are close to float64", kernels()->name);
  }
}

// A worker that is late for the last loop of its pool must still end with it: or this never does.
void check_pools_come_and_go() {
  for (int i = 0; i < 2000; ++i) {
    set_num_threads(2 + i % 2);
    std::atomic<int> done{0};
    parallel_for(2, [&](int64_t) { ++done; });
    expect(done.load() == 2, "a loop of a new pool", "pool");
  }
  set_num_threads(3);
}

void check_samplers() {
  for (int64_t columns : {1, 17, 1500, 20000}) {
    const Floats x = random_floats(3 * columns, 6), bias = random_floats(columns, 7);
    std::vector<int32_t> mask(3 * ((columns + 31) / 32), -1), history(columns, 3), ids(3, -1);
    mask[mask.size() - 1] ^= 1 << ((columns - 1) % 32);
    for (float top_p : {1.0f, 0.9f}) {
      const std::vector<SampleSettings> settings(3, {1.5f, top_p, 0.001f, 1.2f, 0.1f, 0.1f});
      const std::vector<SampleNumbers> numbers{{0, 1, {2, 3}, -1}, {9, 1, {2, 3}, 0}, {999, 4, {2, 3}, -1}};
      const std::string problem = sample({x.data(), mask.data(), history.data(), bias.data(), settings.data(),
                                          numbers.data(), ids.data(), 3, columns, 1});
      bool valid = problem.empty();
      for (int32_t id : {ids[0], ids[1]}) valid &= id >= 0 && id < columns;
      // The last row may not draw the last token; with one token nothing is left, and the answer is -1.
      valid &= columns == 1 ? ids[2] == -1 : ids[2] >= 0 && ids[2] < columns - 1;
      expect(valid, "a sampler draws what may come", kernels()->name);
    }
  }
}

void check_loops() {
  std::vector<int> seen(1000);
  for (int round = 0; round < 200; ++round) parallel_for(1000, [&](int64_t i) { ++seen[i]; });
  bool each_once = true;
  for (int count : seen) each_once &= count == 200;
  expect(each_once, "a loop calls each index once", "pool");

  std::vector<std::thread> callers;
  std::vector<int64_t> sums(3);
  for (int64_t& sum : sums) {
    callers.emplace_back([&sum] {
      for (int round = 0; round < 50; ++round) {
        std::vector<int64_t> parts(64);
        parallel_for(64, [&](int64_t i) { parts[i] = i; });
        for (int64_t part : parts) sum += part;
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  for (int64_t sum : sums) expect(sum == 50 * 63 * 32, "loops of several threads do not disturb each other", "pool");
}

void check_fork() {
  const pid_t child = fork();
  if (child == 0) {
    std::vector<int> seen(100);
    parallel_for(100, [&](int64_t i) { seen[i] = 1; });
    int sum = 0;
    for (int one : seen) sum += one;
    _exit(sum == 100 ? 0 : 1);
  }
  int status = 1;
  waitpid(child, &status, 0);
  expect(status == 0, "a forked child has a pool of its own", "pool");
}

}  // namespace

int main(int count, char** arguments) {
  set_num_threads(3);
  check_loops();
  check_pools_come_and_go();
  check_lazy_zeros();
  // ThreadSanitizer does not follow a child that starts threads.
  if (count == 1 || std::string(arguments[1]) != "without-fork") check_fork();
  for (const char* isa : {"baseline", "avx2", "avx512", "avx512_vnni", "avx512_bf16"}) {
    if (!isa_is_supported(isa)) continue;
    expect(select_isa(isa).empty(), "a supported instruction set can be selected", isa);
    for (Encoding encoding : {Encoding::kF32, Encoding::kBf16}) {
      check_matmul(encoding, 1, 7, 5);
      check_matmul(encoding, 13, 33, 47);
      check_matmul(encoding, 101, 16, 64);
      check_matmul(encoding, 17, 512, 33);
      check_embedding(encoding, 7, 47);
      check_embedding(encoding, 64, 1);
    }
    for (Encoding encoding : {Encoding::kQ8_0, Encoding::kQ4_0, Encoding::kQ4K, Encoding::kQ6K}) {
      for (int64_t rows : {1, 5, 8, 12, 13}) check_matmul(encoding, rows, 256, 47);
      check_matmul(encoding, 197, 512, 33);
      check_blocks(encoding, 512, 47);
      check_embedding(encoding, 512, 47);
      check_embedding(encoding, 256, 1);
    }
    for (int encoding = 0; encoding < kNumEncodings; ++encoding) {
      for (int64_t tokens : {1, 5}) check_decoder(static_cast<Encoding>(encoding), tokens);
    }
    check_argmax();
    check_norm();
    check_logprobs();
    check_samplers();
    for (bool bf16 : {false, true}) {
      check_attention(20, 5, 0, bf16);
      check_attention(64, 5, 7, bf16);
      check_attention(16, 200, 0, bf16);
    }
  }
  expect(!select_isa("made_up").empty(), "an unknown instruction set is refused", "made_up");
  if (failures == 0) std::puts("all kernels passed");
  return failures;
}
