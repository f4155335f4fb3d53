// Registers of 32-bit cells of four bytes: unsigned codes times signed rows, summed in integers,
// the same on every instruction set.
#pragma once

#include <cmath>

#include "kernels/attention_tiles.h"

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

// What codes are multiplied by, 1 and 2 times, over and over so that 64 channels can be read from
// any of the d.
struct Multipliers {
  uint8_t once[kMaxHeadDim + 64], twice[kMaxHeadDim + 64];

  // steps: of a page; largest: of its chunk, each channel at least as large.
  Multipliers(const float* steps, const float* largest, int d) {
    for (int c = 0; c < d; ++c) {
      const float x = steps[c] / largest[c] * kLargestStep;
      once[c] = x > 0.0f && x < 256.0f ? static_cast<uint8_t>(x + 0.5f) : 0;
    }
    for (int c = 0; c < 64; ++c) once[d + c] = once[c];  // what repeats, repeats itself
    for (int c = 0; c < d + 64; ++c) twice[c] = static_cast<uint8_t>(2 * once[c]);
  }
};

// 64 codes as bytes, times the multipliers from `at` on.
static inline void expand_64(const uint8_t* codes, const Multipliers& m, int at, uint8_t* out) {
#ifdef SPS_WIDE_REGISTERS
  const __m512i bytes = _mm512_broadcast_i32x4(
      _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
  const __m512i index = _mm512_cvtepu8_epi32(
      _mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
  const __m512i x = _mm512_shuffle_epi8(
      bytes, _mm512_mullo_epi32(index, _mm512_set1_epi32(0x01010101)));
  const __mmask64 one = _mm512_test_epi8_mask(x, _mm512_set1_epi32(0x40100401));
  const __mmask64 two =
      _mm512_test_epi8_mask(x, _mm512_set1_epi32(static_cast<int>(0x80200802u)));
  const __m512i value = _mm512_maskz_loadu_epi8(one, m.once + at);
  _mm512_storeu_si512(out,
                      _mm512_mask_add_epi8(value, two, value, _mm512_loadu_si512(m.twice + at)));
#elif defined(__AVX2__)
  const __m256i one = _mm256_set1_epi32(0x40100401);
  const __m256i two = _mm256_set1_epi32(static_cast<int>(0x80200802u));
  for (int i = 0; i < 64; i += 32) {
    const __m256i bytes = _mm256_cvtepu8_epi32(
        _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + i / 4)));
    const __m256i x = _mm256_shuffle_epi8(
        bytes, _mm256_setr_epi8(0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12, 0, 0, 0, 0, 4,
                                4, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12));
    const auto* once = reinterpret_cast<const __m256i*>(m.once + at + i);
    const auto* twice = reinterpret_cast<const __m256i*>(m.twice + at + i);
    const __m256i first = _mm256_cmpeq_epi8(_mm256_and_si256(x, one), one);
    const __m256i second = _mm256_cmpeq_epi8(_mm256_and_si256(x, two), two);
    const __m256i value =
        _mm256_add_epi8(_mm256_and_si256(first, _mm256_loadu_si256(once)),
                        _mm256_and_si256(second, _mm256_loadu_si256(twice)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), value);
  }
#else
  for (int c = 0; c < 64; ++c)
    out[c] = static_cast<uint8_t>((codes[c / 4] >> (2 * (c % 4)) & 3) * m.once[at + c]);
#endif
}

// A page's codes as bytes [page, d], times the multipliers. page * d is a multiple of 128.
static inline void expand_codes(const char* codes, int page, int d, const Multipliers& m,
                                uint8_t* out) {
  const auto* from = reinterpret_cast<const uint8_t*>(codes);
  const int total = page * d;
  for (int i = 0, at = 0; i < total; i += 64) {
    expand_64(from + i / 4, m, at, out + i);
    at = (at + 64) % d;
  }
}

}  // namespace SPS_ISA_NS
}  // namespace sps
