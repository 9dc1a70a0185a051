// Threads that spin briefly and then sleep, and a loop whose chunks they take one after the other.
#pragma once

#include <cstdint>

namespace max_kernels {

// Threads that a loop may use, the caller's included: what was set, or else the CPUs that this process may run on.
int num_threads();

// Changes that number from the next loop on; 0 returns to the CPUs of the process.
void set_num_threads(int threads);

using Chunk = void (*)(void* context, int64_t index);

// Calls `chunk` for every index below `count`, in any order and on several threads, and returns when all are done.
// A loop inside a chunk, or beside a loop of another thread, runs on its caller alone. Denormals are flushed.
void parallel_for(int64_t count, Chunk chunk, void* context);

template <class Body>
void parallel_for(int64_t count, Body body) {
  parallel_for(
      count, [](void* context, int64_t index) { (*static_cast<Body*>(context))(index); }, &body);
}

}  // namespace max_kernels
