// Registers of 32-bit cells of four bytes: unsigned codes times signed rows, summed in integers,
// the same on every instruction set.
#pragma once

#include <cmath>

#include "kernels/modes.h"

namespace sps {
namespace SPS_ISA_NS {

// A code times the largest multiplier: products of two fit 16 bits, as VPMADDUBSW wants.
constexpr int kLargestStep = 42;

#ifdef SPS_WIDE_REGISTERS

struct Bytes {
  using reg = __m512i;
  static reg zero() { return _mm512_setzero_si512(); }
  static reg load(const void* p) { return _mm512_loadu_si512(p); }
  static reg bcast(const void* p) {
    int32_t x;
    __builtin_memcpy(&x, p, 4);
    return _mm512_set1_epi32(x);
  }
  static reg dot(reg codes, reg rows, reg sum) {
#ifdef SPS_HAS_VNNI
    return _mm512_dpbusd_epi32(sum, codes, rows);
#else
    const reg pairs = _mm512_maddubs_epi16(codes, rows);
    return _mm512_add_epi32(sum, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
#endif
  }
  static Wide::reg to_float(reg x) { return _mm512_cvtepi32_ps(x); }
  // Four floats of each lane, at most 127 in size, as the lane's four bytes.
  static void store_rounded(const Wide::reg* x, void* p) {
    const reg low = _mm512_set1_epi32(255);
    reg cell = _mm512_slli_epi32(_mm512_cvtps_epi32(x[3]), 24);
    for (int i = 0; i < 3; ++i)
      cell = _mm512_or_si512(
          cell, _mm512_slli_epi32(_mm512_and_si512(_mm512_cvtps_epi32(x[i]), low), 8 * i));
    _mm512_storeu_si512(p, cell);
  }
};

#elif defined(__AVX2__)

struct Bytes {
  using reg = __m256i;
  static reg zero() { return _mm256_setzero_si256(); }
  static reg load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  static reg bcast(const void* p) {
    int32_t x;
    __builtin_memcpy(&x, p, 4);
    return _mm256_set1_epi32(x);
  }
  static reg dot(reg codes, reg rows, reg sum) {
    const reg pairs = _mm256_maddubs_epi16(codes, rows);
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
  static Wide::reg to_float(reg x) { return _mm256_cvtepi32_ps(x); }
  static void store_rounded(const Wide::reg* x, void* p) {
    const reg low = _mm256_set1_epi32(255);
    reg cell = _mm256_slli_epi32(_mm256_cvtps_epi32(x[3]), 24);
    for (int i = 0; i < 3; ++i)
      cell = _mm256_or_si256(
          cell, _mm256_slli_epi32(_mm256_and_si256(_mm256_cvtps_epi32(x[i]), low), 8 * i));
    _mm256_storeu_si256(static_cast<__m256i*>(p), cell);
  }
};

#else

struct Bytes {
  struct reg {
    int32_t v[8];
  };
  static reg zero() { return {}; }
  static reg load(const void* p) {
    reg r;
    __builtin_memcpy(&r, p, sizeof r);
    return r;
  }
  static reg bcast(const void* p) {
    reg r;
    for (int i = 0; i < 8; ++i) __builtin_memcpy(&r.v[i], p, 4);
    return r;
  }
  static reg dot(const reg& codes, const reg& rows, const reg& sum) {
    reg r = sum;
    for (int i = 0; i < 8; ++i) {
      uint8_t c[4];
      int8_t x[4];
      __builtin_memcpy(c, &codes.v[i], 4);
      __builtin_memcpy(x, &rows.v[i], 4);
      for (int j = 0; j < 4; ++j) r.v[i] += c[j] * x[j];
    }
    return r;
  }
  static Wide::reg to_float(const reg& x) {
    return Wide::each([&](int i) { return static_cast<float>(x.v[i]); });
  }
  static void store_rounded(const Wide::reg* x, void* p) {
    int8_t cells[32];
    for (int i = 0; i < 32; ++i)
      cells[i] = static_cast<int8_t>(static_cast<int>(::nearbyintf(x[i % 4].v[i / 4])));
    __builtin_memcpy(p, cells, sizeof cells);
  }
};

#endif

// A page's codes [page / 4, d] as bytes [page, d], channel c multiplied by step[c] (at most
// kLargestStep); d bytes of `step`.
static inline void expand_codes(const char* codes, int page, int d, const uint8_t* step,
                                uint8_t* out) {
  const int64_t quarter = static_cast<int64_t>(page / 4) * d;
  for (int i = 0; i < page / 4; ++i) {
    const uint8_t* row = reinterpret_cast<const uint8_t*>(codes) + static_cast<int64_t>(i) * d;
    for (int j = 0; j < 4; ++j) {
      uint8_t* to = out + j * quarter + static_cast<int64_t>(i) * d;
      for (int c = 0; c < d; ++c)
        to[c] = static_cast<uint8_t>((row[c] >> (2 * j) & 3) * step[c]);
    }
  }
}

}  // namespace SPS_ISA_NS
}  // namespace sps
