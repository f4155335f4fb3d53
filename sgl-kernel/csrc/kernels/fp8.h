// Scalar fp8 e4m3 (the "fn" kind: no infinities, one NaN of each sign), as bits; no branches, so
// that compilers make vectors of it. static inline: every instruction set gets its own copy.
#pragma once

#include <cstdint>

namespace sps {
namespace {

inline float fp8_to_float(uint8_t code) {
  const uint32_t magnitude = code & 0x7f, sign = static_cast<uint32_t>(code & 0x80) << 24;
  const uint32_t normal = (magnitude << 20) + (120u << 23);
  const float subnormal = static_cast<float>(magnitude) * 0x1p-9f;
  uint32_t bits;
  __builtin_memcpy(&bits, &subnormal, 4);
  bits = magnitude < 8 ? bits : normal;
  bits = (magnitude == 0x7f ? 0x7fc00000u : bits) | sign;
  float x;
  __builtin_memcpy(&x, &bits, 4);
  return x;
}

// Rounds to nearest even; what is too large, infinities too, becomes 448; NaN stays NaN.
inline uint8_t float_to_fp8(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  const uint32_t size = bits & 0x7fffffffu, sign = bits >> 24 & 0x80;
  // Below 2^-6 steps are 2^-9 wide, as those of floats from 2^14 on are: adding rounds.
  float lifted;
  __builtin_memcpy(&lifted, &size, 4);
  lifted += 0x1p14f;
  uint32_t subnormal;
  __builtin_memcpy(&subnormal, &lifted, 4);
  const uint32_t normal = ((size + 0x7ffffu + ((size >> 20) & 1)) >> 20) - (120u << 3);
  uint32_t code = size < 0x3c800000u ? subnormal - 0x46800000u : normal;
  code = code > 0x7e ? 0x7e : code;
  code = size > 0x7f800000u ? 0x7f : code;
  return static_cast<uint8_t>(code | sign);
}

}  // namespace
}  // namespace sps
