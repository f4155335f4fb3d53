// Scratch memory of the calling thread, kept between calls.
#pragma once

#include <cstddef>

namespace sps {

// At least `bytes` bytes, aligned to 64, contents undefined; valid until the thread's next call for
// the same slot (0; or 1, for what calls kernels that use 0). Throws std::bad_alloc.
void* thread_scratch(size_t bytes, int slot = 0);

}  // namespace sps
