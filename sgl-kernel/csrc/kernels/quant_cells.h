// Blocks of codes as registers to multiply: kSteps registers' worth of 16 outputs a block, one
// column a step as floats, or two columns a step as pairs of bfloat16. Codes are exact in both.
#pragma once

#include "kernels/gemm_kernel.h"
#include "kernels/quant_format.h"

namespace sps {
namespace SPS_ISA_NS {

constexpr int kQuantRegs = 16 / Wide::W;  // registers that hold one number of each output

template <PackedKind kKind>
struct FloatCells {
  static constexpr int kSteps = 8, kBytes = kKind == PackedKind::kInt8 ? 128 : 64;
  static Wide::reg dot(const Wide::reg& w, const Wide::reg& x, const Wide::reg& sum) {
    return Wide::fma(w, x, sum);
  }
};

#ifdef SPS_WIDE_REGISTERS

struct Int8AsF32 : FloatCells<PackedKind::kInt8> {
  const char* block;
  explicit Int8AsF32(const char* block) : block(block) {}
  void weights(int step, Wide::reg* w) const {
    const auto* at = reinterpret_cast<const __m128i*>(block + 16 * step);
    w[0] = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(at)));
  }
};

struct Int4AsF32 : FloatCells<PackedKind::kInt4> {
  __m512i nibbles;
  explicit Int4AsF32(const char* block) : nibbles(_mm512_loadu_si512(block)) {}
  // A permutation looks only at the lowest 4 bits of its indices.
  void weights(int step, Wide::reg* w) const {
    const __m512 values = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(
        _mm_loadu_si128(reinterpret_cast<const __m128i*>(kInt4Values))));
    w[0] = _mm512_permutexvar_ps(_mm512_srli_epi32(nibbles, int4_shift(step)), values);
  }
};

#elif defined(__AVX2__)

static inline __m256 byte_as_f32(__m256i bytes, int byte) {
  const __m256i top = _mm256_slli_epi32(bytes, 24 - 8 * byte);
  return _mm256_cvtepi32_ps(_mm256_srai_epi32(top, 24));
}

struct Int8AsF32 : FloatCells<PackedKind::kInt8> {
  const char* block;
  explicit Int8AsF32(const char* block) : block(block) {}
  void weights(int step, Wide::reg* w) const {
    for (int i = 0; i < 2; ++i) {
      const auto* at = reinterpret_cast<const __m128i*>(block + 16 * step + 8 * i);
      w[i] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(at)));
    }
  }
};

struct Int4AsF32 : FloatCells<PackedKind::kInt4> {
  __m256i even[2], odd[2];  // values of the nibbles at even and at odd places
  explicit Int4AsF32(const char* block) {
    const __m256i values = _mm256_broadcastsi128_si256(
        _mm_loadu_si128(reinterpret_cast<const __m128i*>(kInt4Values)));
    const __m256i low = _mm256_set1_epi8(15);
    for (int i = 0; i < 2; ++i) {
      const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(block + 32 * i));
      even[i] = _mm256_shuffle_epi8(values, _mm256_and_si256(v, low));
      odd[i] = _mm256_shuffle_epi8(values, _mm256_and_si256(_mm256_srli_epi32(v, 4), low));
    }
  }
  void weights(int step, Wide::reg* w) const {
    const int nibble = int4_shift(step) / 4;
    for (int i = 0; i < 2; ++i)
      w[i] = byte_as_f32(nibble % 2 == 0 ? even[i] : odd[i], nibble / 2);
  }
};

#else

template <PackedKind kKind>
struct CodesAsF32 : FloatCells<kKind> {
  const char* block;
  explicit CodesAsF32(const char* block) : block(block) {}
  void weights(int step, Wide::reg* w) const {
    for (int i = 0; i < 2; ++i)
      w[i] = Wide::each([&](int lane) {
        return static_cast<float>(quant_code(kKind, block, step, 8 * i + lane));
      });
  }
};
using Int8AsF32 = CodesAsF32<PackedKind::kInt8>;
using Int4AsF32 = CodesAsF32<PackedKind::kInt4>;

#endif

#ifdef SPS_HAS_DPBF16

template <PackedKind kKind>
struct PairCells {
  static constexpr int kSteps = 4, kBytes = kKind == PackedKind::kInt8 ? 128 : 64;
  static Wide::reg dot(Wide::reg w, Wide::reg x, Wide::reg sum) {
    return ModeBf16::dot<Wide>(w, x, sum);
  }
};

// Small integers have zeros below the upper half of their float: that half is the bfloat16.
struct Int8AsPairs : PairCells<PackedKind::kInt8> {
  Int8AsF32 columns;
  explicit Int8AsPairs(const char* block) : columns(block) {}
  void weights(int step, Wide::reg* w) const {
    Wide::reg even, odd;
    columns.weights(2 * step, &even);
    columns.weights(2 * step + 1, &odd);
    const __m512i low = _mm512_srli_epi32(_mm512_castps_si512(even), 16);
    w[0] = _mm512_castsi512_ps(_mm512_or_si512(low, _mm512_castps_si512(odd)));
  }
};

// bfloat16 of the values, twice: a permutation of words looks at 5 bits of its indices, of which
// the highest belongs to the next nibble.
alignas(64) static const uint16_t kInt4Bf16[2 * kInt4Levels] = {
    0xc2fe, 0xc2d0, 0xc2a6, 0xc282, 0xc244, 0xc20c, 0xc1b0, 0xc120, 0x3f80, 0x4150, 0x41c8,
    0x4218, 0x4254, 0x428a, 0x42b2, 0x42e2, 0xc2fe, 0xc2d0, 0xc2a6, 0xc282, 0xc244, 0xc20c,
    0xc1b0, 0xc120, 0x3f80, 0x4150, 0x41c8, 0x4218, 0x4254, 0x428a, 0x42b2, 0x42e2};

struct Int4AsPairs : PairCells<PackedKind::kInt4> {
  __m512i nibbles;
  explicit Int4AsPairs(const char* block) : nibbles(_mm512_loadu_si512(block)) {}
  void weights(int step, Wide::reg* w) const {
    const __m512i index = _mm512_srli_epi16(nibbles, 4 * step);
    w[0] = _mm512_castsi512_ps(
        _mm512_permutexvar_epi16(index, _mm512_load_si512(kInt4Bf16)));
  }
};

#endif

}  // namespace SPS_ISA_NS
}  // namespace sps
