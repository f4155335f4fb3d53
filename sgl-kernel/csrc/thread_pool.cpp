// Workers sleep on a condition variable; with a spin they look for the next job for a while first:
// the products of a decode step follow one another by microseconds, less than a waking takes.
#include "sps/thread_pool.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#include "sps/fence.h"

namespace sps {
namespace {

std::atomic<double> spin_seconds{0.0};

// Looks until ready() or for the time of a spin.
template <class F>
void spin_until(F&& ready) {
  using Clock = std::chrono::steady_clock;
  const double limit = spin_seconds.load(std::memory_order_relaxed);
  if (limit <= 0) return;
  const Clock::time_point start = Clock::now();
  while (std::chrono::duration<double>(Clock::now() - start).count() < limit)
    for (int i = 0; i < 32; ++i) {
      if (ready()) return;
      cpu_pause();
    }
}

struct Job {
  TaskFn fn;
  void* context;
  int64_t n;
  std::atomic<int64_t> next{0};
  int wanted;                   // workers that may still join
  std::atomic<int> working{0};  // workers inside; changed under the lock
};

class Pool {
 public:
  void run(int threads, int64_t n, TaskFn fn, void* context) {
    Job job{fn, context, n, {}, threads - 1, {}};
    {
      std::lock_guard<std::mutex> lock(mutex_);
      while (static_cast<int>(workers_.size()) < threads - 1)
        workers_.emplace_back([this] { work(); });
      job_ = &job;
      jobs_.fetch_add(1);
    }
    wake_.notify_all();
    drain(job);
    std::unique_lock<std::mutex> lock(mutex_);
    job_ = nullptr;
    if (job.working.load() != 0) {
      lock.unlock();
      spin_until([&] { return job.working.load() == 0; });
      lock.lock();
    }
    done_.wait(lock, [&] { return job.working.load() == 0; });
  }

  std::mutex& busy() { return busy_; }

 private:
  static void drain(Job& job) {
    for (int64_t i; (i = job.next.fetch_add(1, std::memory_order_relaxed)) < job.n;)
      job.fn(job.context, i);
  }

  void work() {
    const auto there = [&] {
      return job_ != nullptr && job_->wanted > 0 && job_->next.load() < job_->n;
    };
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      if (!there()) {
        const uint64_t seen = jobs_.load();
        lock.unlock();
        spin_until([&] { return jobs_.load() != seen; });
        lock.lock();
      }
      wake_.wait(lock, there);
      Job& job = *job_;
      --job.wanted;
      ++job.working;
      lock.unlock();
      drain(job);
      lock.lock();
      if (--job.working == 0) done_.notify_one();
    }
  }

  std::mutex busy_, mutex_;
  std::condition_variable wake_, done_;
  std::vector<std::thread> workers_;
  Job* job_ = nullptr;
  std::atomic<uint64_t> jobs_{0};
};

// Never destroyed: its workers may outlive static destruction, and a forked child must not join
// threads that it does not have.
std::atomic<Pool*> pool_instance{nullptr};

Pool& pool() {
  Pool* p = pool_instance.load(std::memory_order_acquire);
  if (p != nullptr) return *p;
  static const int registered = pthread_atfork(nullptr, nullptr, [] { pool_instance = nullptr; });
  (void)registered;
  Pool* fresh = new Pool;
  if (pool_instance.compare_exchange_strong(p, fresh)) return *fresh;
  delete fresh;
  return *p;
}

}  // namespace

void set_pool_spin(double seconds) { spin_seconds.store(seconds); }

void parallel_for(int threads, int64_t n, TaskFn fn, void* context) {
  threads = static_cast<int>(std::min<int64_t>(threads, n));
  if (threads > 1) {
    Pool& p = pool();
    std::unique_lock<std::mutex> mine(p.busy(), std::try_to_lock);
    if (mine.owns_lock()) return p.run(threads, n, fn, context);
  }
  for (int64_t i = 0; i < n; ++i) fn(context, i);
}

}  // namespace sps
