// A small persistent pool of threads per process. Workers sleep when there is nothing to do.
#pragma once

#include <cstdint>

namespace sps {

// How long a worker that has nothing to do, and a caller that waits for workers, look before they
// sleep; 0 at first. For processes whose threads have cores of their own.
void set_pool_spin(double seconds);

using TaskFn = void (*)(void* context, int64_t index);

// Runs fn(context, i) for i in [0, n) on at most `threads` threads, the caller among them. Tasks
// are taken in order. When another caller holds the pool, all tasks run on the calling thread.
// fn must not throw.
void parallel_for(int threads, int64_t n, TaskFn fn, void* context);

template <class F>
void parallel_for(int threads, int64_t n, F&& f) {
  parallel_for(threads, n, [](void* c, int64_t i) { (*static_cast<F*>(c))(i); }, &f);
}

}  // namespace sps
