// The board on which ranks of a host find the tokens that one of them sampled, in the runtime's
// layout: a line with the bell, then a 64-bit word a slot, `epoch << 32 | token`. A word is written
// and read by single accesses and carries all that its reader needs.
#pragma once

#include <cstdint>

namespace sps {

class TokenBoard {
 public:
  static constexpr int64_t kLine = 64;

  // memory: aligned to 8. spin_us: how long a wait looks before it sleeps.
  TokenBoard(char* memory, double spin_us);

  // Stores a word; whoever finds it sees all that was stored before. Wakes nobody.
  void put(int64_t slot, uint32_t epoch, uint32_t value);
  // Wakes all who wait.
  void ring();
  // False: the word is of another epoch.
  bool get(int64_t slot, uint32_t epoch, uint32_t& value) const;
  // False after timeout_s seconds, or when `interrupted` says so, which is asked at most every 50 ms.
  bool wait(int64_t slot, uint32_t epoch, double timeout_s, bool (*interrupted)(),
            uint32_t& value) const;

 private:
  uint32_t* bell_;
  uint64_t* words_;
  double spin_us_;
};

}  // namespace sps
