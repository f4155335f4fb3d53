// Blocks of codes as floats to multiply: 16 outputs of one of the block's columns a step.
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
    const __m512i bytes = _mm512_loadu_si512(block + step / 4 * 64);
    const __m512i top = _mm512_slli_epi32(bytes, 24 - 8 * (step % 4));
    w[0] = _mm512_cvtepi32_ps(_mm512_srai_epi32(top, 24));
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
      const auto* at = reinterpret_cast<const __m256i*>(block + step / 4 * 64 + 32 * i);
      w[i] = byte_as_f32(_mm256_loadu_si256(at), step % 4);
    }
  }
};

struct Int4AsF32 : FloatCells<PackedKind::kInt4> {
  __m256i lower[2], upper[2];  // values of the nibbles of each byte
  explicit Int4AsF32(const char* block) {
    const __m256i values = _mm256_broadcastsi128_si256(
        _mm_loadu_si128(reinterpret_cast<const __m128i*>(kInt4Values)));
    const __m256i low = _mm256_set1_epi8(15);
    for (int i = 0; i < 2; ++i) {
      const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(block + 32 * i));
      lower[i] = _mm256_shuffle_epi8(values, _mm256_and_si256(v, low));
      upper[i] = _mm256_shuffle_epi8(values, _mm256_and_si256(_mm256_srli_epi32(v, 4), low));
    }
  }
  void weights(int step, Wide::reg* w) const {
    for (int i = 0; i < 2; ++i) w[i] = byte_as_f32(step < 4 ? lower[i] : upper[i], step % 4);
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

}  // namespace SPS_ISA_NS
}  // namespace sps
