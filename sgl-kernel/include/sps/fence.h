// Words in memory shared by several processes: publish, read, wait, wake.
#pragma once

#include <cstdint>

namespace sps {

// `bytes` is 4 or 8; the address is aligned to it.
void store_release(void* word, int bytes, uint64_t value);
uint64_t load_acquire(const void* word, int bytes);
// Stores the larger of the present and the given value; returns what was there before.
uint64_t fetch_max(void* word, int bytes, uint64_t value);
uint64_t fetch_add(void* word, int bytes, uint64_t value);

// Waits until *word >= value (unsigned): spins for spin_us microseconds, then sleeps on a futex
// that other processes mapping the same memory can wake. False after timeout_s seconds; a negative
// timeout never ends. `interrupted` (may be null) is asked about every 50 ms; true ends the wait.
bool wait_at_least(const void* word, int bytes, uint64_t value, double spin_us, double timeout_s,
                   bool (*interrupted)());

// Sleeps while the word's low half is `seen`, at most `seconds`; may return early for no reason.
void sleep_on(const void* word, int bytes, uint32_t seen, double seconds);

// Tells the core that this is a loop of looks.
void cpu_pause();

// Wakes every waiter on the word.
void wake_all(void* word, int bytes);

}  // namespace sps
