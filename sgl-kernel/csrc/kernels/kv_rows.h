// Rows of quantised keys and values (sps/kv_format.h): written once, decoded into the dtype of the
// queries where they are attended to, so that all that follows is the same as with native pages.
#pragma once

#include <cmath>
#include <cstring>

#include "kernels/bf16.h"
#include "kernels/fp8.h"
#include "sps/kv_format.h"

namespace sps {
namespace SPS_ISA_NS {

struct Int8Row {
  static Wide::reg load(const char* p) { return Wide::load_i8(p); }
  static float get(const char* p) { return static_cast<float>(static_cast<int8_t>(*p)); }
  static float scale(const char* row, int d) {
    float x;
    __builtin_memcpy(&x, row + d, 4);
    return x;
  }
};

struct Fp8Row {
  static Wide::reg load(const char* p) { return Wide::load_fp8(p); }
  static float get(const char* p) { return fp8_to_float(static_cast<uint8_t>(*p)); }
  static float scale(const char*, int) { return 1.0f; }
};

// dst: d bfloat16 (kBytes 2) or float (4).
template <class Row, int kBytes>
static inline void decode_row(const char* row, int d, char* dst) {
  const float scale = Row::scale(row, d);
  const Wide::reg s = Wide::set1(scale);
  int i = 0;
  for (; i + Wide::W <= d; i += Wide::W) {
    const Wide::reg x = Wide::mul(Row::load(row + i), s);
    if (kBytes == 2)
      Wide::store_bf16(dst + 2 * i, x);
    else
      Wide::store(dst + 4 * i, x);
  }
  for (; i < d; ++i) {
    const float x = Row::get(row + i) * scale;
    const uint16_t h = float_to_bf16(x);
    if (kBytes == 2)
      __builtin_memcpy(dst + 2 * i, &h, 2);
    else
      __builtin_memcpy(dst + 4 * i, &x, 4);
  }
}

#ifdef SPS_WIDE_REGISTERS
// Every fp8 is a bfloat16: normal ones by moving their exponent, the eight others from a table.
static inline __m512i fp8_to_bf16(__m256i codes) {
  const __m512i subnormals = _mm512_castsi128_si512(
      _mm_setr_epi16(0, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60));
  const __m512i low = _mm512_set1_epi16(0x7f), w = _mm512_cvtepu8_epi16(codes);
  const __m512i size = _mm512_and_si512(w, low);
  const __m512i sign = _mm512_slli_epi16(_mm512_andnot_si512(low, w), 8);
  __m512i x = _mm512_add_epi16(_mm512_slli_epi16(size, 4), _mm512_set1_epi16(120 << 7));
  x = _mm512_mask_permutexvar_epi16(x, _mm512_cmplt_epu16_mask(size, _mm512_set1_epi16(8)), size,
                                    subnormals);
  x = _mm512_mask_mov_epi16(x, _mm512_cmpeq_epi16_mask(size, low), _mm512_set1_epi16(0x7fc0));
  return _mm512_or_si512(x, sign);
}

template <>
inline void decode_row<Fp8Row, 2>(const char* row, int d, char* dst) {
  int i = 0;
  for (; i + 32 <= d; i += 32) {
    const __m256i codes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + i));
    _mm512_storeu_si512(dst + 2 * i, fp8_to_bf16(codes));
  }
  for (; i < d; ++i) {
    const uint16_t h = float_to_bf16(Fp8Row::get(row + i));
    __builtin_memcpy(dst + 2 * i, &h, 2);
  }
}
#endif

// The step between values is the largest / 127, so the largest is met exactly. Rows of next to
// nothing (their step's inverse would overflow) become zeros.
static inline void encode_int8(const float* x, int d, char* row) {
  float largest = 0.0f, poison = 0.0f;
  for (int i = 0; i < d; ++i) {
    const float size = ::fabsf(x[i]);
    largest = size > largest ? size : largest;
    poison += x[i] * 0.0f;  // NaN where something is not finite
  }
  const bool some = largest > 1e-30f;
  const float scale = (some ? largest / 127.0f : 0.0f) + poison;
  const float inverse = some && poison == 0.0f ? 127.0f / largest : 0.0f;
  for (int i = 0; i < d; ++i) {
    const float y = poison == 0.0f ? ::nearbyintf(x[i] * inverse) : 0.0f;
    row[i] = static_cast<char>(static_cast<int8_t>(static_cast<int32_t>(y)));
  }
  __builtin_memcpy(row + d, &scale, 4);
}

static inline void encode_fp8(const float* x, int d, char* row) {
  for (int i = 0; i < d; ++i) row[i] = static_cast<char>(float_to_fp8(x[i]));
}

}  // namespace SPS_ISA_NS
}  // namespace sps
