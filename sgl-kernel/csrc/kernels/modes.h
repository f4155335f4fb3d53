// How elements are stored and multiplied. A mode says how many elements a 32-bit cell holds
// (kPerCell), whether tiles are converted before use, and how a cell is multiplied and stored.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels/bf16.h"

namespace sps {
namespace SPS_ISA_NS {

static inline void convert_bf16_row(const char* src, float* dst, int n) {
  int i = 0;
  for (; i + Wide::W <= n; i += Wide::W) Wide::store(dst + i, Wide::load_bf16(src + 2 * i));
  for (; i < n; ++i) {
    uint16_t h;
    __builtin_memcpy(&h, src + 2 * i, 2);
    dst[i] = bf16_to_float(h);
  }
}

// Cells of one float: float32 inputs.
struct ModeF32 {
  static constexpr int kPerCell = 1;
  static constexpr int kElemBytes = 4;
  static constexpr bool kConvert = false;

  template <class V>
  static typename V::reg dot(typename V::reg a, typename V::reg b, typename V::reg acc) {
    return V::fma(a, b, acc);
  }
  // Probabilities of keys 2j and 2j + 1 (x0, x1), in rows of `stride` floats starting at p.
  template <class V>
  static void store_pair(float* p, int64_t stride, int j, typename V::reg x0,
                         typename V::reg x1) {
    V::store(p + 2 * j * stride, x0);
    V::store(p + (2 * j + 1) * stride, x1);
  }
  // Values of one step (one key), `kRegs` registers of columns from `row`.
  template <class V, int kRegs>
  static void load_values(const char* row, int64_t, typename V::reg* out) {
    for (int i = 0; i < kRegs; ++i) out[i] = V::load(row + i * V::W * 4);
  }
  static void convert_row(const char* src, float* dst, int n) {
    std::memcpy(dst, src, static_cast<size_t>(n) * 4);
  }
};

// bfloat16 inputs, multiplied as floats: tiles are converted once per block of queries.
struct ModeBf16AsF32 : ModeF32 {
  static constexpr int kElemBytes = 2;
  static constexpr bool kConvert = true;
  static void convert_row(const char* src, float* dst, int n) { convert_bf16_row(src, dst, n); }
};

}  // namespace SPS_ISA_NS
}  // namespace sps
