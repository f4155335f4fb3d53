// Why this is right on every machine: a ring's counters are stored with release after the bytes
// they speak of were copied, and loaded with acquire before; each has one writer. Who finds nothing
// to do has read its doorbell before it looked, says that it sleeps, and sleeps only if the bell is
// unchanged; who moved something changes the bell first and then looks for a sleeper. All four are
// sequentially consistent, so one of the two sees the other, and no ring is lost.
#include "sps/links.h"

#include <algorithm>
#include <chrono>
#include <cstring>

#include "sps/fence.h"

namespace sps {
namespace {

using Clock = std::chrono::steady_clock;

constexpr double kNap = 0.05;  // seconds between questions about signals

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

}  // namespace

int64_t Links::region_bytes(int world, int64_t ring_bytes) {
  return world * kLine + int64_t{world} * world * (2 * kLine + ring_bytes);
}

Links::Links(char* memory, int rank, int world, int64_t ring_bytes, double timeout_s,
             double spin_us)
    : memory_(memory),
      rank_(rank),
      world_(world),
      ring_bytes_(ring_bytes),
      timeout_s_(timeout_s),
      spin_us_(spin_us) {}

uint32_t* Links::bell(int rank) const {
  return reinterpret_cast<uint32_t*>(memory_ + rank * kLine);
}

Links::Ring Links::ring(int source, int target) const {
  const int64_t index = int64_t{source} * world_ + target;
  char* at = memory_ + world_ * kLine + index * (2 * kLine + ring_bytes_);
  return {reinterpret_cast<uint64_t*>(at), reinterpret_cast<uint64_t*>(at + kLine),
          at + 2 * kLine};
}

// Puts in what there is room for, at most a quarter of the ring at once, so that the receiver
// copies while the sender does.
bool Links::push(Message& m) {
  const Ring r = ring(rank_, m.peer);
  const uint64_t produced = *r.produced;  // only written here
  const int64_t used = static_cast<int64_t>(produced - load_acquire(r.consumed, 8));
  const int64_t count =
      std::min({ring_bytes_ - used, m.bytes, std::max<int64_t>(1, ring_bytes_ / 4)});
  if (count <= 0) return false;
  const int64_t begin = static_cast<int64_t>(produced % static_cast<uint64_t>(ring_bytes_));
  const int64_t first = std::min(count, ring_bytes_ - begin);
  std::memcpy(r.data + begin, m.data, static_cast<size_t>(first));
  std::memcpy(r.data, m.data + first, static_cast<size_t>(count - first));
  store_release(r.produced, 8, produced + static_cast<uint64_t>(count));
  m.data += count;
  m.bytes -= count;
  return true;
}

// Takes what is there. `more` tells whether the message goes on: only then can its sender be
// waiting for the room.
bool Links::pull(Message& m, bool& more) {
  const Ring r = ring(m.peer, rank_);
  const uint64_t consumed = *r.consumed;  // only written here
  const int64_t there = static_cast<int64_t>(load_acquire(r.produced, 8) - consumed);
  const int64_t count = std::min(there, m.bytes);
  if (count <= 0) return false;
  const int64_t begin = static_cast<int64_t>(consumed % static_cast<uint64_t>(ring_bytes_));
  const int64_t first = std::min(count, ring_bytes_ - begin);
  std::memcpy(m.data, r.data + begin, static_cast<size_t>(first));
  std::memcpy(m.data + first, r.data, static_cast<size_t>(count - first));
  store_release(r.consumed, 8, consumed + static_cast<uint64_t>(count));
  m.data += count;
  m.bytes -= count;
  more = m.bytes > 0;
  return true;
}

bool Links::pass(std::vector<Message>& out, std::vector<Message>& in) {
  const auto done = [](const Message& m) { return m.bytes == 0; };
  bool moved = false, more = false;
  for (Message& m : out)
    if (push(m)) {
      moved = true;
      ring_bell(m.peer);
    }
  for (Message& m : in)
    if (pull(m, more)) {
      moved = true;
      if (more) ring_bell(m.peer);
    }
  out.erase(std::remove_if(out.begin(), out.end(), done), out.end());
  in.erase(std::remove_if(in.begin(), in.end(), done), in.end());
  return moved;
}

void Links::ring_bell(int peer) {
  __atomic_fetch_add(bell(peer), 1u, __ATOMIC_SEQ_CST);
  if (__atomic_load_n(sleeping(peer), __ATOMIC_SEQ_CST) != 0) wake_all(bell(peer), 4);
}

// Returns after the bell changed from `seen`, or after a nap.
void Links::wait(uint32_t seen) {
  uint32_t* mine = bell(rank_);
  const Clock::time_point start = Clock::now();
  while (seconds_since(start) < 1e-6 * spin_us_)
    for (int i = 0; i < 64; ++i) {
      if (__atomic_load_n(mine, __ATOMIC_SEQ_CST) != seen) return;
      cpu_pause();
    }
  __atomic_store_n(sleeping(rank_), 1u, __ATOMIC_SEQ_CST);
  if (__atomic_load_n(mine, __ATOMIC_SEQ_CST) == seen)
    sleep_on(mine, 4, seen, std::min(kNap, timeout_s_));
  __atomic_store_n(sleeping(rank_), 0u, __ATOMIC_SEQ_CST);
}

void Links::exchange(std::vector<Message>& out, std::vector<Message>& in, bool (*interrupted)()) {
  Clock::time_point moved_at = Clock::now();
  double waited = 0;
  while (!out.empty() || !in.empty()) {
    const uint32_t seen = __atomic_load_n(bell(rank_), __ATOMIC_SEQ_CST);
    if (pass(out, in)) {
      moved_at = Clock::now();
      continue;
    }
    if (seconds_since(moved_at) > timeout_s_)
      throw ConnectionLost("rank " + std::to_string((in.empty() ? out : in).front().peer) +
                           " did not answer rank " + std::to_string(rank_) + " in time");
    const Clock::time_point began = Clock::now();
    wait(seen);
    const double took = seconds_since(began);
    waited += took;
    if (took > 0.5 * kNap && interrupted != nullptr && interrupted()) throw Interrupted();
  }
  waited_ns_.fetch_add(static_cast<int64_t>(1e9 * waited), std::memory_order_relaxed);
}

}  // namespace sps
