// One pool per process, made at the first loop and made anew in a forked child.
#include "thread_pool.h"

#include <pthread.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <sched.h>
#endif
#if defined(__x86_64__) && !defined(MAX_KERNELS_PORTABLE)
#include <xmmintrin.h>
#endif

namespace max_kernels {
namespace {

// Kernels of one step follow each other within microseconds: sleeping in between would cost 50 us per wake-up.
constexpr auto kSpin = std::chrono::microseconds(100);

void pause_briefly() {
#if defined(__x86_64__) && !defined(MAX_KERNELS_PORTABLE)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Workers and callers may come with different float modes; a chunk must give the same bits on each of them.
class FlushDenormals {
 public:
#if defined(__x86_64__) && !defined(MAX_KERNELS_PORTABLE)
  FlushDenormals() : before_(_mm_getcsr()) { _mm_setcsr(0x9fc0); }  // flush both ways, nearest even, no traps
  ~FlushDenormals() { _mm_setcsr(before_); }

 private:
  unsigned before_;
#elif defined(__aarch64__)
  FlushDenormals() {
    asm volatile("mrs %0, fpcr" : "=r"(before_));
    asm volatile("msr fpcr, %0" : : "r"(uint64_t{1} << 24));
  }
  ~FlushDenormals() { asm volatile("msr fpcr, %0" : : "r"(before_)); }

 private:
  uint64_t before_;
#else
  FlushDenormals() {}
#endif
};

int available_cpus() {
#if defined(__linux__)
  cpu_set_t cpus;
  if (sched_getaffinity(0, sizeof cpus, &cpus) == 0) return CPU_COUNT(&cpus);
#endif
  const unsigned cpus_of_machine = std::thread::hardware_concurrency();
  return cpus_of_machine ? static_cast<int>(cpus_of_machine) : 1;
}

class Pool {
 public:
  // Of `threads`, as many as the system has room for: a container may limit them.
  explicit Pool(int threads) : threads_wanted_(threads) {
    workers_.reserve(threads - 1);
    try {
      for (int i = 1; i < threads; ++i) workers_.emplace_back([this] { work(); });
    } catch (const std::system_error&) {
    }
  }

  ~Pool() {
    stopping_.store(true);
    announce();
    for (std::thread& worker : workers_) worker.join();
  }

  int threads_wanted() const { return threads_wanted_; }

  void run(int64_t count, Chunk chunk, void* context) {
    // An odd turn is one in preparation. A worker counts itself before it looks at the turn: once none is counted, a
    // late one will see the odd turn and leave the loop's fields alone.
    turn_.fetch_add(1);
    while (active_.load() != 0) pause_briefly();
    chunk_ = chunk;
    context_ = context;
    count_ = count;
    next_.store(0);
    announce();
    take_chunks();
    for (int spins = 0; active_.load() != 0; ++spins) {
      if (spins < 20000) {
        pause_briefly();
      } else {
        std::this_thread::yield();  // the worker has lost its CPU to somebody else
      }
    }
  }

 private:
  void announce() {
    turn_.fetch_add(1);
    if (sleepers_.load() == 0) return;
    std::lock_guard<std::mutex> lock(mutex_);
    wake_.notify_all();
  }

  void take_chunks() {
    FlushDenormals mode;
    for (int64_t i; (i = next_.fetch_add(1)) < count_;) chunk_(context_, i);
  }

  void work() {
    uint64_t seen = 0;
    for (;;) {
      wait_for_turn_after(seen);
      active_.fetch_add(1);
      seen = turn_.load();
      if (seen % 2 == 0) take_chunks();
      active_.fetch_sub(1);
      // Looked at behind the turn: a worker that was late for the last loop may have seen the turn that ends it.
      if (stopping_.load()) return;
    }
  }

  void wait_for_turn_after(uint64_t seen) {
    const auto start = std::chrono::steady_clock::now();
    for (;;) {
      for (int i = 0; i < 64; ++i) {
        if (turn_.load() != seen) return;
        pause_briefly();
      }
      if (std::chrono::steady_clock::now() - start > kSpin) break;
    }
    std::unique_lock<std::mutex> lock(mutex_);
    sleepers_.fetch_add(1);
    wake_.wait(lock, [&] { return turn_.load() != seen; });
    sleepers_.fetch_sub(1);
  }

  const int threads_wanted_;
  std::vector<std::thread> workers_;
  std::atomic<bool> stopping_{false};
  std::mutex mutex_;
  std::condition_variable wake_;
  std::atomic<int> sleepers_{0};
  Chunk chunk_ = nullptr;
  void* context_ = nullptr;
  int64_t count_ = 0;
  alignas(64) std::atomic<uint64_t> turn_{0};
  alignas(64) std::atomic<int64_t> next_{0};
  alignas(64) std::atomic<int> active_{0};
};

// Never destroyed: at exit other threads may still be in a loop, and sleeping workers end with the process.
struct Shared {
  std::mutex in_use;
  Pool* pool = nullptr;
};
std::atomic<Shared*> shared{nullptr};
std::atomic<int> wanted_threads{0};
thread_local bool in_loop = false;

// A child has the memory of the pool but none of its threads: it starts over, and the copy stays unused.
void forget_pool() { shared.store(new Shared); }

Shared& the_pool() {
  static const bool watches_forks = [] {
    shared.store(new Shared);
    pthread_atfork(nullptr, nullptr, forget_pool);
    return true;
  }();
  (void)watches_forks;
  return *shared.load();
}

void run_alone(int64_t count, Chunk chunk, void* context) {
  FlushDenormals mode;
  for (int64_t i = 0; i < count; ++i) chunk(context, i);
}

}  // namespace

int num_threads() {
  const int wanted = wanted_threads.load();
  if (wanted > 0) return wanted;
  static const int cpus = available_cpus();
  return cpus;
}

void set_num_threads(int threads) { wanted_threads.store(threads); }

void parallel_for(int64_t count, Chunk chunk, void* context) {
  if (count <= 1 || in_loop || num_threads() == 1) return run_alone(count, chunk, context);
  Shared& state = the_pool();
  std::unique_lock<std::mutex> lock(state.in_use, std::try_to_lock);
  if (!lock.owns_lock()) return run_alone(count, chunk, context);
  if (state.pool == nullptr || state.pool->threads_wanted() != num_threads()) {
    delete state.pool;
    state.pool = new Pool(num_threads());
  }
  in_loop = true;
  state.pool->run(count, chunk, context);
  in_loop = false;
}

}  // namespace max_kernels
