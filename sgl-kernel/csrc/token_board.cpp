#include "sps/token_board.h"

#include <algorithm>
#include <chrono>

#include "sps/fence.h"

namespace sps {
namespace {

using Clock = std::chrono::steady_clock;

// A ring that comes between a look and the sleep after it may be missed on machines that reorder
// stores: it then costs so long.
constexpr double kNap = 1e-3;
constexpr int kNapsBetweenQuestions = 50;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

}  // namespace

TokenBoard::TokenBoard(char* memory, double spin_us)
    : bell_(reinterpret_cast<uint32_t*>(memory)),
      words_(reinterpret_cast<uint64_t*>(memory + kLine)),
      spin_us_(spin_us) {}

void TokenBoard::put(int64_t slot, uint32_t epoch, uint32_t value) {
  store_release(words_ + slot, 8, (uint64_t{epoch} << 32) | value);
}

void TokenBoard::ring() {
  __atomic_fetch_add(bell_, 1u, __ATOMIC_SEQ_CST);
  wake_all(bell_, 4);
}

bool TokenBoard::get(int64_t slot, uint32_t epoch, uint32_t& value) const {
  const uint64_t word = load_acquire(words_ + slot, 8);
  value = static_cast<uint32_t>(word);
  return static_cast<uint32_t>(word >> 32) == epoch;
}

bool TokenBoard::wait(int64_t slot, uint32_t epoch, double timeout_s, bool (*interrupted)(),
                      uint32_t& value) const {
  if (get(slot, epoch, value)) return true;
  const Clock::time_point start = Clock::now();
  while (seconds_since(start) < 1e-6 * spin_us_)
    for (int i = 0; i < 64; ++i) {
      if (get(slot, epoch, value)) return true;
      cpu_pause();
    }
  for (int naps = 1;; ++naps) {
    const uint32_t seen = __atomic_load_n(bell_, __ATOMIC_SEQ_CST);
    if (get(slot, epoch, value)) return true;
    const double left = timeout_s - seconds_since(start);
    if (left <= 0) return false;
    if (naps % kNapsBetweenQuestions == 0 && interrupted != nullptr && interrupted()) return false;
    sleep_on(bell_, 4, seen, std::min(left, kNap));
  }
}

}  // namespace sps
