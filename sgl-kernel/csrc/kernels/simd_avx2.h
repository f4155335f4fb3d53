// Vectors of 8 floats under AVX2 and FMA. A "cell" is one float.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "kernels/exp2_poly.h"
#include "kernels/transpose_avx.h"

namespace sps {
namespace SPS_ISA_NS {

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
  static float hsum(reg a) {
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
  }
  static float hmax(reg a) {
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
  }
  static reg bcast(const void* p) {
    float x;
    __builtin_memcpy(&x, p, 4);
    return _mm256_set1_ps(x);
  }
  // 2^x for x <= 127, relative error under 2e-7; 0 below -126 (and at -inf).
  static reg exp2(reg x) {
    const reg floor_x = _mm256_max_ps(_mm256_floor_ps(x), set1(-127.0f));
    const reg f = sub(_mm256_max_ps(x, set1(-127.0f)), floor_x);
    reg p = fma(set1(kExp2C5), f, set1(kExp2C4));
    p = fma(p, f, set1(kExp2C3));
    p = fma(p, f, set1(kExp2C2));
    p = fma(p, f, set1(kExp2C1));
    p = fma(p, f, set1(1.0f));
    const ireg n = _mm256_cvtps_epi32(floor_x);
    const ireg pow2 = _mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23);
    return mul(p, _mm256_castsi256_ps(pow2));
  }
  static reg keep_between(reg x, int pos, ireg lo, ireg hi) {
    const ireg p = _mm256_set1_epi32(pos);
    const ireg out = _mm256_or_si256(_mm256_cmpgt_epi32(lo, p), _mm256_cmpgt_epi32(p, hi));
    return _mm256_blendv_ps(x, set1(-__builtin_inff()), _mm256_castsi256_ps(out));
  }
  static reg finite_or_zero(reg x) {
    return _mm256_and_ps(x, _mm256_cmp_ps(x, set1(-__builtin_inff()), _CMP_NEQ_UQ));
  }
  static reg div(reg a, reg b) { return _mm256_div_ps(a, b); }
  // Rounds to nearest even.
  static void store_bf16(void* p, reg x) {
    const ireg bits = _mm256_castps_si256(x);
    const ireg odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const ireg sum = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const ireg nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    const ireg quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const ireg rounded = _mm256_srli_epi32(_mm256_blendv_epi8(sum, quiet, nan), 16);
    const ireg packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded, rounded), 0x88);
    _mm_storeu_si128(static_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
  }
  // The lower, and the upper, bfloat16 of each 32-bit lane.
  static reg even_bf16(reg x) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(x), 16));
  }
  static reg odd_bf16(reg x) {
    return _mm256_and_ps(x, _mm256_castsi256_ps(_mm256_set1_epi32(-65536)));
  }
  static reg load_i8(const void* p) {
    return _mm256_cvtepi32_ps(
        _mm256_cvtepi8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(p))));
  }
  // fp8 e4m3, by way of a float16 that is 256 times smaller.
  static reg load_fp8(const void* p) {
    const __m128i w = _mm_cvtepu8_epi16(_mm_loadl_epi64(static_cast<const __m128i*>(p)));
    const __m128i size = _mm_and_si128(w, _mm_set1_epi16(0x7f));
    const __m128i sign = _mm_slli_epi16(_mm_andnot_si128(_mm_set1_epi16(0x7f), w), 8);
    const __m128i half = _mm_or_si128(sign, _mm_slli_epi16(size, 7));
    const ireg nan = _mm256_cvtepi16_epi32(_mm_cmpeq_epi16(size, _mm_set1_epi16(0x7f)));
    return _mm256_blendv_ps(mul(_mm256_cvtph_ps(half), set1(256.0f)),
                            set1(__builtin_nanf("")), _mm256_castsi256_ps(nan));
  }
  // out[i] = sum of the lanes of r[i], for 16 registers.
  static void hsum16(const reg* r, float* out) {
    for (int i = 0; i < 16; ++i) out[i] = hsum(r[i]);
  }
  static reg load_bf16(const void* p) {
    const __m128i h = _mm_loadu_si128(static_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
  }
};

using Wide = V8;
using Narrow = V8;

}  // namespace SPS_ISA_NS
}  // namespace sps
