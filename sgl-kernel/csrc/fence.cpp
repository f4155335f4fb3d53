#include "sps/fence.h"

#include <algorithm>
#include <chrono>
#include <climits>
#include <thread>

#ifdef __linux__
#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
#endif

namespace sps {
namespace {

using Clock = std::chrono::steady_clock;
using Seconds = std::chrono::duration<double>;

// A futex compares 32 bits: the low half of a 64-bit word, which changes whenever the word grows
// by less than 2^32.
const uint32_t* futex_half(const void* word, int bytes) {
  const uint32_t* half = static_cast<const uint32_t*>(word);
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
  return half + (bytes == 8);
#else
  (void)bytes;
  return half;
#endif
}

}  // namespace

void cpu_pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

void sleep_on(const void* word, int bytes, uint32_t seen, double seconds) {
#ifdef __linux__
  timespec t;
  t.tv_sec = static_cast<time_t>(seconds);
  t.tv_nsec = static_cast<long>((seconds - static_cast<double>(t.tv_sec)) * 1e9);
  syscall(SYS_futex, futex_half(word, bytes), FUTEX_WAIT, seen, &t, nullptr, 0);
#else
  (void)word, (void)bytes, (void)seen;
  std::this_thread::sleep_for(Seconds(std::min(seconds, 50e-6)));
#endif
}

void store_release(void* word, int bytes, uint64_t value) {
  if (bytes == 8)
    __atomic_store_n(static_cast<uint64_t*>(word), value, __ATOMIC_RELEASE);
  else
    __atomic_store_n(static_cast<uint32_t*>(word), static_cast<uint32_t>(value),
                     __ATOMIC_RELEASE);
}

uint64_t load_acquire(const void* word, int bytes) {
  if (bytes == 8) return __atomic_load_n(static_cast<const uint64_t*>(word), __ATOMIC_ACQUIRE);
  return __atomic_load_n(static_cast<const uint32_t*>(word), __ATOMIC_ACQUIRE);
}

template <class T>
static uint64_t fetch_max_of(T* word, T value) {
  T seen = __atomic_load_n(word, __ATOMIC_ACQUIRE);
  while (seen < value &&
         !__atomic_compare_exchange_n(word, &seen, value, true, __ATOMIC_ACQ_REL,
                                      __ATOMIC_ACQUIRE)) {
  }
  return seen;
}

uint64_t fetch_max(void* word, int bytes, uint64_t value) {
  if (bytes == 8) return fetch_max_of(static_cast<uint64_t*>(word), value);
  return fetch_max_of(static_cast<uint32_t*>(word), static_cast<uint32_t>(value));
}

uint64_t fetch_add(void* word, int bytes, uint64_t value) {
  if (bytes == 8)
    return __atomic_fetch_add(static_cast<uint64_t*>(word), value, __ATOMIC_ACQ_REL);
  return __atomic_fetch_add(static_cast<uint32_t*>(word), static_cast<uint32_t>(value),
                            __ATOMIC_ACQ_REL);
}

bool wait_at_least(const void* word, int bytes, uint64_t value, double spin_us, double timeout_s,
                   bool (*interrupted)()) {
  if (load_acquire(word, bytes) >= value) return true;
  const bool bounded = timeout_s >= 0;
  const Clock::time_point start = Clock::now();
  const auto elapsed = [&] { return Seconds(Clock::now() - start).count(); };
  const double spin_s = bounded ? std::min(spin_us * 1e-6, timeout_s) : spin_us * 1e-6;
  while (spin_s > 0 && elapsed() < spin_s)
    for (int i = 0; i < 32; ++i) {
      if (load_acquire(word, bytes) >= value) return true;
      cpu_pause();
    }
  for (;;) {
    const uint64_t seen = load_acquire(word, bytes);
    if (seen >= value) return true;
    const double left = bounded ? timeout_s - elapsed() : 1.0;
    if (left <= 0) return false;
    sleep_on(word, bytes, static_cast<uint32_t>(seen), std::min(left, 0.05));
    if (interrupted != nullptr && interrupted()) return false;
  }
}

void wake_all(void* word, int bytes) {
#ifdef __linux__
  syscall(SYS_futex, futex_half(word, bytes), FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
#else
  (void)word, (void)bytes;
#endif
}

}  // namespace sps
