// Vectors of 16 and of 8 floats under AVX-512 (F, DQ, BW, VL), and of bfloat16 pairs.
// A "cell" is what one 32-bit lane multiplies: one float, or a pair of bfloat16.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "kernels/exp2_poly.h"
#include "kernels/transpose_avx.h"

namespace sps {
namespace SPS_ISA_NS {

struct V16 {
  static constexpr int W = 16;
  using reg = __m512;
  using ireg = __m512i;

  static reg zero() { return _mm512_setzero_ps(); }
  static reg set1(float x) { return _mm512_set1_ps(x); }
  static reg load(const void* p) { return _mm512_loadu_ps(p); }
  static void store(void* p, reg x) { _mm512_storeu_ps(p, x); }
  static ireg iload(const int32_t* p) { return _mm512_loadu_si512(p); }
  static reg add(reg a, reg b) { return _mm512_add_ps(a, b); }
  static reg sub(reg a, reg b) { return _mm512_sub_ps(a, b); }
  static reg mul(reg a, reg b) { return _mm512_mul_ps(a, b); }
  static reg fma(reg a, reg b, reg c) { return _mm512_fmadd_ps(a, b, c); }
  static reg max(reg a, reg b) { return _mm512_max_ps(a, b); }
  static float hmax(reg a) { return _mm512_reduce_max_ps(a); }
  static float hsum(reg a) { return _mm512_reduce_add_ps(a); }
  static reg bcast(const void* p) {
    int32_t x;
    __builtin_memcpy(&x, p, 4);
    return _mm512_castsi512_ps(_mm512_set1_epi32(x));
  }
  // 2^x, relative error under 2e-7; 0 at -inf.
  static reg exp2(reg x) {
    const reg f = _mm512_reduce_ps(x, 0x01);  // x - floor(x)
    reg p = fma(set1(kExp2C5), f, set1(kExp2C4));
    p = fma(p, f, set1(kExp2C3));
    p = fma(p, f, set1(kExp2C2));
    p = fma(p, f, set1(kExp2C1));
    p = fma(p, f, set1(1.0f));
    return _mm512_scalef_ps(p, x);
  }
  // x where lo <= pos <= hi, else -inf.
  static reg keep_between(reg x, int pos, ireg lo, ireg hi) {
    const ireg p = _mm512_set1_epi32(pos);
    const __mmask16 in = _mm512_cmple_epi32_mask(lo, p) & _mm512_cmple_epi32_mask(p, hi);
    return _mm512_mask_mov_ps(set1(-__builtin_inff()), in, x);
  }
  // x with 0 where it is -inf.
  static reg finite_or_zero(reg x) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, set1(-__builtin_inff()), _CMP_NEQ_UQ), x);
  }
  static reg div(reg a, reg b) { return _mm512_div_ps(a, b); }
  static reg load_bf16(const void* p) {
    const __m256i h = _mm256_loadu_si256(static_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
  }
  // Rounds to nearest even.
  static void store_bf16(void* p, reg x) {
#ifdef SPS_HAS_DPBF16
    const __m256i h = (__m256i)_mm512_cvtneps_pbh(x);
#else
    const ireg bits = _mm512_castps_si512(x);
    const ireg odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    ireg rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    rounded = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
    const __m256i h = _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
#endif
    _mm256_storeu_si256(static_cast<__m256i*>(p), h);
  }
  // The lower, and the upper, bfloat16 of each 32-bit lane.
  static reg even_bf16(reg x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(x), 16));
  }
  static reg odd_bf16(reg x) {
    return _mm512_castsi512_ps(
        _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(-65536)));
  }
  static reg load_i8(const void* p) {
    const __m128i bytes = _mm_loadu_si128(static_cast<const __m128i*>(p));
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
  }
  // fp8 e4m3, by way of a float16 that is 256 times smaller.
  static reg load_fp8(const void* p) {
    const __m256i w = _mm256_cvtepu8_epi16(_mm_loadu_si128(static_cast<const __m128i*>(p)));
    const __m256i size = _mm256_and_si256(w, _mm256_set1_epi16(0x7f));
    const __m256i sign = _mm256_slli_epi16(_mm256_andnot_si256(_mm256_set1_epi16(0x7f), w), 8);
    const __m256i half = _mm256_or_si256(sign, _mm256_slli_epi16(size, 7));
    const __mmask16 nan = _mm256_cmpeq_epi16_mask(size, _mm256_set1_epi16(0x7f));
    return _mm512_mask_mov_ps(mul(_mm512_cvtph_ps(half), set1(256.0f)), nan,
                              set1(__builtin_nanf("")));
  }
  // out[i] = sum of the lanes of r[i], for 16 registers.
  static void hsum16(const reg* r, float* out) {
    reg a[8], b[4], c[2];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i)
      a[i] = add(_mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]),
                 _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]));
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i)
      b[i] = add(_mm512_shuffle_ps(a[2 * i], a[2 * i + 1], 0x44),
                 _mm512_shuffle_ps(a[2 * i], a[2 * i + 1], 0xee));
    // Each quarter of b[i] now holds partial sums of r[4i .. 4i + 3].
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i)
      c[i] = add(_mm512_shuffle_f32x4(b[2 * i], b[2 * i + 1], 0x88),
                 _mm512_shuffle_f32x4(b[2 * i], b[2 * i + 1], 0xdd));
    store(out, add(_mm512_shuffle_f32x4(c[0], c[1], 0x88),
                   _mm512_shuffle_f32x4(c[0], c[1], 0xdd)));
  }
};

struct V8 {
  static constexpr int W = 8;
  using reg = __m256;
  using ireg = __m256i;

  static reg zero() { return _mm256_setzero_ps(); }
  static reg set1(float x) { return _mm256_set1_ps(x); }
  static reg load(const void* p) { return _mm256_loadu_ps(static_cast<const float*>(p)); }
  static void store(void* p, reg x) { _mm256_storeu_ps(static_cast<float*>(p), x); }
  static ireg iload(const int32_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  static reg add(reg a, reg b) { return _mm256_add_ps(a, b); }
  static reg sub(reg a, reg b) { return _mm256_sub_ps(a, b); }
  static reg mul(reg a, reg b) { return _mm256_mul_ps(a, b); }
  static reg fma(reg a, reg b, reg c) { return _mm256_fmadd_ps(a, b, c); }
  static reg max(reg a, reg b) { return _mm256_max_ps(a, b); }
  static reg bcast(const void* p) {
    int32_t x;
    __builtin_memcpy(&x, p, 4);
    return _mm256_castsi256_ps(_mm256_set1_epi32(x));
  }
  static reg exp2(reg x) {
    const reg f = _mm256_reduce_ps(x, 0x01);
    reg p = fma(set1(kExp2C5), f, set1(kExp2C4));
    p = fma(p, f, set1(kExp2C3));
    p = fma(p, f, set1(kExp2C2));
    p = fma(p, f, set1(kExp2C1));
    p = fma(p, f, set1(1.0f));
    return _mm256_scalef_ps(p, x);
  }
  static reg keep_between(reg x, int pos, ireg lo, ireg hi) {
    const ireg p = _mm256_set1_epi32(pos);
    const __mmask8 in = _mm256_cmple_epi32_mask(lo, p) & _mm256_cmple_epi32_mask(p, hi);
    return _mm256_mask_mov_ps(set1(-__builtin_inff()), in, x);
  }
  static reg finite_or_zero(reg x) {
    return _mm256_maskz_mov_ps(_mm256_cmp_ps_mask(x, set1(-__builtin_inff()), _CMP_NEQ_UQ), x);
  }
};

using Wide = V16;
using Narrow = V8;

}  // namespace SPS_ISA_NS
}  // namespace sps
