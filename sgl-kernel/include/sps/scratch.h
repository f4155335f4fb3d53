// Scratch memory of the calling thread, kept between calls.
#pragma once

#include <cstddef>

namespace sps {

// At least `bytes` bytes, aligned to 64, contents undefined; valid until the thread's next call.
// Throws std::bad_alloc.
void* thread_scratch(size_t bytes);

}  // namespace sps
