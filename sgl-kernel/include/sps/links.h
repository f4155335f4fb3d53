// Messages between the ranks of one host: a ring of bytes per directed pair in shared memory.
#pragma once

#include <atomic>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace sps {

// A peer is gone, or nothing moved for too long.
struct ConnectionLost : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// A signal's handler wants the call to end.
struct Interrupted : std::exception {
  const char* what() const noexcept override { return "interrupted"; }
};

// What is left of a message to or from one rank.
struct Message {
  int peer;
  char* data;
  int64_t bytes;
};

// One rank's ends of all rings. The region: for each rank a line with its doorbell and whether it
// sleeps, then a ring for each (sender, receiver): a line with the bytes produced, a line with the
// bytes consumed, `ring_bytes` of data. It is zero at first.
class Links {
 public:
  static constexpr int64_t kLine = 64;

  static int64_t region_bytes(int world, int64_t ring_bytes);

  // spin_us: how long a wait looks before it sleeps; 0 where ranks outnumber cores.
  Links(char* memory, int rank, int world, int64_t ring_bytes, double timeout_s, double spin_us);

  // Sends and receives everything; the vectors are used up. Messages of a pair keep their order
  // from call to call. `interrupted` is asked about every 50 ms of waiting. Throws ConnectionLost
  // when nothing moved for timeout_s, Interrupted when `interrupted` says so.
  void exchange(std::vector<Message>& out, std::vector<Message>& in, bool (*interrupted)());

  // Seconds spent waiting since this was asked last.
  double take_waited() { return 1e-9 * static_cast<double>(waited_ns_.exchange(0)); }

  int rank() const { return rank_; }
  int world() const { return world_; }

 private:
  struct Ring {
    uint64_t* produced;
    uint64_t* consumed;
    char* data;
  };

  bool push(Message& message);
  bool pull(Message& message, bool& more);
  bool pass(std::vector<Message>& out, std::vector<Message>& in);
  void ring_bell(int peer);
  void wait(uint32_t seen);
  uint32_t* bell(int rank) const;
  uint32_t* sleeping(int rank) const { return bell(rank) + 1; }
  Ring ring(int source, int target) const;

  char* memory_;
  int rank_, world_;
  int64_t ring_bytes_;
  double timeout_s_, spin_us_;
  std::atomic<int64_t> waited_ns_{0};
};

}  // namespace sps
