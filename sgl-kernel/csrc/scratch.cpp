#include "sps/scratch.h"

#include <cstdlib>
#include <new>

namespace sps {
namespace {

struct Arena {
  void* data = nullptr;
  size_t size = 0;
  ~Arena() { std::free(data); }
};

}  // namespace

void* thread_scratch(size_t bytes, int slot) {
  thread_local Arena arenas[2];
  Arena& arena = arenas[slot];
  if (bytes > arena.size) {
    const size_t size = (bytes + 4095) / 4096 * 4096;
    void* data = std::aligned_alloc(64, size);
    if (data == nullptr) throw std::bad_alloc();
    std::free(arena.data);
    arena.data = data;
    arena.size = size;
  }
  return arena.data;
}

}  // namespace sps
