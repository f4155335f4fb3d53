#include "sps/crc32c.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <vector>

#include "sps/thread_pool.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define SPS_CRC_X86 1
#endif

namespace sps {
namespace {

constexpr uint32_t kPolynomial = 0x82f63b78u;  // reflected

using ByteTables = std::array<std::array<uint32_t, 256>, 8>;

// Slicing by 8: table t advances a byte over t further bytes.
const ByteTables& byte_tables() {
  static const ByteTables tables = [] {
    ByteTables t{};
    for (uint32_t i = 0; i < 256; ++i) {
      uint32_t crc = i;
      for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ (crc & 1 ? kPolynomial : 0);
      t[0][i] = crc;
    }
    for (size_t s = 1; s < 8; ++s)
      for (size_t i = 0; i < 256; ++i) t[s][i] = (t[s - 1][i] >> 8) ^ t[0][t[s - 1][i] & 0xff];
    return t;
  }();
  return tables;
}

uint32_t extend_generic(uint32_t crc, const unsigned char* p, size_t n) {
  const ByteTables& t = byte_tables();
  for (; n >= 8; p += 8, n -= 8) {
    uint32_t out = 0;
    for (size_t i = 0; i < 8; ++i) {
      const uint32_t byte = p[i] ^ (i < 4 ? (crc >> (8 * i)) & 0xff : 0);
      out ^= t[7 - i][byte];
    }
    crc = out;
  }
  for (; n > 0; ++p, --n) crc = (crc >> 8) ^ t[0][(crc ^ *p) & 0xff];
  return crc;
}

// Appending zero bytes to a message is a linear map of its CRC: a matrix over GF(2), squared to
// double the count of bytes (as zlib's crc32_combine does).
using Matrix = std::array<uint32_t, 32>;

uint32_t apply(const Matrix& m, uint32_t x) {
  uint32_t sum = 0;
  for (size_t i = 0; x != 0; ++i, x >>= 1)
    if (x & 1) sum ^= m[i];
  return sum;
}

Matrix squared(const Matrix& m) {
  Matrix out;
  for (size_t i = 0; i < 32; ++i) out[i] = apply(m, m[i]);
  return out;
}

uint32_t append_zeros(uint32_t crc, uint64_t bytes) {
  Matrix m;  // one zero bit
  m[0] = kPolynomial;
  for (uint32_t i = 1; i < 32; ++i) m[i] = 1u << (i - 1);
  for (int i = 0; i < 3; ++i) m = squared(m);
  for (; bytes != 0; bytes >>= 1) {
    if (bytes & 1) crc = apply(m, crc);
    m = squared(m);
  }
  return crc;
}

#ifdef SPS_CRC_X86
constexpr size_t kLane = 4096;

// Appends kLane zero bytes, a byte of the CRC at a time.
const std::array<std::array<uint32_t, 256>, 4>& lane_tables() {
  static const auto tables = [] {
    std::array<std::array<uint32_t, 256>, 4> t{};
    for (size_t b = 0; b < 4; ++b)
      for (uint32_t i = 0; i < 256; ++i) t[b][i] = append_zeros(i << (8 * b), kLane);
    return t;
  }();
  return tables;
}

__attribute__((target("sse4.2"))) inline uint64_t step(uint64_t crc, const unsigned char* p) {
  uint64_t word;
  std::memcpy(&word, p, 8);
  return _mm_crc32_u64(crc, word);
}

// The instruction takes 3 cycles and one starts every cycle: three lanes at once, then joined.
__attribute__((target("sse4.2"))) uint32_t extend_sse42(uint32_t crc, const unsigned char* p,
                                                        size_t n) {
  const auto& t = lane_tables();
  const auto shift = [&t](uint64_t c) {
    return t[0][c & 0xff] ^ t[1][(c >> 8) & 0xff] ^ t[2][(c >> 16) & 0xff] ^ t[3][(c >> 24) & 0xff];
  };
  for (; n >= 3 * kLane; p += 3 * kLane, n -= 3 * kLane) {
    uint64_t a = crc, b = 0, c = 0;
    for (size_t i = 0; i < kLane; i += 8) {
      a = step(a, p + i);
      b = step(b, p + kLane + i);
      c = step(c, p + 2 * kLane + i);
    }
    crc = shift(shift(a) ^ static_cast<uint32_t>(b)) ^ static_cast<uint32_t>(c);
  }
  uint64_t rest = crc;
  for (; n >= 8; p += 8, n -= 8) rest = step(rest, p);
  crc = static_cast<uint32_t>(rest);
  for (; n > 0; ++p, --n) crc = _mm_crc32_u8(crc, *p);
  return crc;
}
#endif

using Extend = uint32_t (*)(uint32_t, const unsigned char*, size_t);

Extend best_extend() {
#ifdef SPS_CRC_X86
  if (__builtin_cpu_supports("sse4.2")) return extend_sse42;
#endif
  return extend_generic;
}

}  // namespace

uint32_t crc32c(uint32_t crc, const void* data, size_t bytes) {
  static const Extend extend = best_extend();
  return ~extend(~crc, static_cast<const unsigned char*>(data), bytes);
}

uint32_t crc32c_generic(uint32_t crc, const void* data, size_t bytes) {
  return ~extend_generic(~crc, static_cast<const unsigned char*>(data), bytes);
}

uint32_t crc32c_parallel(const void* data, size_t bytes, int threads) {
  constexpr size_t kPart = size_t{4} << 20;
  const size_t parts = (bytes + kPart - 1) / kPart;
  if (threads == 1 || parts < 2) return crc32c(0, data, bytes);
  std::vector<uint32_t> crcs(parts);
  const char* p = static_cast<const char*>(data);
  parallel_for(threads, static_cast<int64_t>(parts), [&](int64_t i) {
    const size_t at = static_cast<size_t>(i) * kPart;
    crcs[static_cast<size_t>(i)] = crc32c(0, p + at, std::min(kPart, bytes - at));
  });
  uint32_t crc = 0;
  for (size_t i = 0; i < parts; ++i)
    crc = append_zeros(crc, std::min(kPart, bytes - i * kPart)) ^ crcs[i];
  return crc;
}

}  // namespace sps
