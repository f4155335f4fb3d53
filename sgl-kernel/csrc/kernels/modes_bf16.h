// Cells of two bfloat16, multiplied by VDPBF16PS.
#pragma once

#include "kernels/modes.h"

namespace sps {
namespace SPS_ISA_NS {

// Interleaves the 16-bit words of two registers: words 0..15 of each, then 16..31.
static inline __m512i interleave_low(__m512i a, __m512i b) {
  alignas(64) static const uint16_t index[32] = {
      0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
      8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  return _mm512_permutex2var_epi16(a, _mm512_load_si512(index), b);
}

static inline __m512i interleave_high(__m512i a, __m512i b) {
  alignas(64) static const uint16_t index[32] = {
      16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55,
      24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63};
  return _mm512_permutex2var_epi16(a, _mm512_load_si512(index), b);
}

struct ModeBf16 {
  static constexpr int kPerCell = 2;
  static constexpr int kElemBytes = 2;
  static constexpr bool kConvert = false;

  template <class V>
  static typename V::reg dot(typename V::reg a, typename V::reg b, typename V::reg acc);
  template <class V>
  static void store_pair(float* p, int64_t stride, int j, typename V::reg x0,
                         typename V::reg x1);
  template <class V, int kRegs>
  static void load_values(const char* row, int64_t stride, typename V::reg* out);
  static void convert_row(const char*, float*, int) {}
};

template <>
inline __m512 ModeBf16::dot<V16>(__m512 a, __m512 b, __m512 acc) {
  return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b);
}
template <>
inline __m256 ModeBf16::dot<V8>(__m256 a, __m256 b, __m256 acc) {
  return _mm256_dpbf16_ps(acc, (__m256bh)a, (__m256bh)b);
}

template <>
inline void ModeBf16::store_pair<V16>(float* p, int64_t stride, int j, __m512 x0, __m512 x1) {
  alignas(64) static const uint16_t index[32] = {
      0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(x1, x0);
  _mm512_storeu_si512(p + j * stride,
                      _mm512_permutexvar_epi16(_mm512_load_si512(index), both));
}
template <>
inline void ModeBf16::store_pair<V8>(float* p, int64_t stride, int j, __m256 x0, __m256 x1) {
  alignas(32) static const uint16_t index[16] = {0, 8,  1, 9,  2, 10, 3, 11,
                                                 4, 12, 5, 13, 6, 14, 7, 15};
  const __m256i both = (__m256i)_mm256_cvtne2ps_pbh(x1, x0);
  const __m256i order = _mm256_load_si256(reinterpret_cast<const __m256i*>(index));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + j * stride),
                      _mm256_permutexvar_epi16(order, both));
}

template <>
inline void ModeBf16::load_values<V16, 2>(const char* row, int64_t stride, __m512* out) {
  const __m512i a = _mm512_loadu_si512(row), b = _mm512_loadu_si512(row + stride);
  out[0] = _mm512_castsi512_ps(interleave_low(a, b));
  out[1] = _mm512_castsi512_ps(interleave_high(a, b));
}
template <>
inline void ModeBf16::load_values<V8, 1>(const char* row, int64_t stride, __m256* out) {
  const __m128i a = _mm_loadu_si128(reinterpret_cast<const __m128i*>(row));
  const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(row + stride));
  out[0] = _mm256_castsi256_ps(
      _mm256_set_m128i(_mm_unpackhi_epi16(a, b), _mm_unpacklo_epi16(a, b)));
}

// dst: cells [d] of two rows of d bfloat16 (d a multiple of 8).
static inline void pack_value_pair(const char* a, const char* b, float* dst, int d) {
  int c = 0;
  for (; c + 32 <= d; c += 32) {
    const __m512i x = _mm512_loadu_si512(a + 2 * c), y = _mm512_loadu_si512(b + 2 * c);
    _mm512_storeu_si512(dst + c, interleave_low(x, y));
    _mm512_storeu_si512(dst + c + 16, interleave_high(x, y));
  }
  for (; c < d; c += 8) {
    const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(a + 2 * c));
    const __m128i y = _mm_loadu_si128(reinterpret_cast<const __m128i*>(b + 2 * c));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(dst + c), _mm_unpacklo_epi16(x, y));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(dst + c + 4), _mm_unpackhi_epi16(x, y));
  }
}

}  // namespace SPS_ISA_NS
}  // namespace sps
