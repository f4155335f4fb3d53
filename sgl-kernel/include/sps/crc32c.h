// CRC-32C (Castagnoli; polynomial 0x1EDC6F41 reflected), as iSCSI and ext4 compute it.
#pragma once

#include <cstddef>
#include <cstdint>

namespace sps {

// The checksum of `crc`'s message followed by these bytes; crc = 0 begins a message.
uint32_t crc32c(uint32_t crc, const void* data, size_t bytes);

// The same without the instruction: for processors without it, and tests.
uint32_t crc32c_generic(uint32_t crc, const void* data, size_t bytes);

// crc32c(0, data, bytes) on `threads` threads.
uint32_t crc32c_parallel(const void* data, size_t bytes, int threads);

}  // namespace sps
