// How quantized panels lie in memory, and what their codes mean.
#pragma once

#include <cstdint>

#include "kernels/bf16.h"
#include "sps/quant.h"

namespace sps {
namespace {

// Values of the 4-bit codes, denser where weights are: those of llama.cpp's IQ4_NL. All are exact
// in bfloat16.
constexpr int kInt4Levels = 16;
constexpr int8_t kInt4Values[kInt4Levels] = {-127, -104, -83, -65, -49, -35, -22, -10,
                                             1,    13,   25,  38,  53,  69,  89,  113};

// A panel is its blocks, then its scales [groups][16], filled up to 64 bytes. An int8 block is
// [8 columns][16 outputs] bytes. An int4 block is 32 bits for each output: column c in nibble c / 2
// of the lower half if c is even, of the upper half if it is odd, so that a shift by 4 t leaves
// columns 2 t and 2 t + 1 in the lowest nibbles of the two halves.
constexpr int int4_shift(int column) { return 4 * (column / 2) + 16 * (column % 2); }

inline int64_t quant_block_bytes(PackedKind kind) {
  return kQuantBlock * kPanelOutputs / (kind == PackedKind::kInt8 ? 1 : 2);
}

inline int64_t quant_codes_bytes(const PackedLayout& layout) {
  return (layout.k + kQuantBlock - 1) / kQuantBlock * quant_block_bytes(layout.kind);
}

inline int quant_code(PackedKind kind, const char* block, int column, int output) {
  if (kind == PackedKind::kInt8) {
    int8_t code;
    __builtin_memcpy(&code, block + column * kPanelOutputs + output, 1);
    return code;
  }
  uint32_t nibbles;
  __builtin_memcpy(&nibbles, block + 4 * output, 4);
  return kInt4Values[(nibbles >> int4_shift(column)) & 15];
}

inline float quant_scale(const char* scales, int64_t group, int output) {
  uint16_t h;
  __builtin_memcpy(&h, scales + group * kQuantScaleBytes + 2 * output, 2);
  return bf16_to_float(h);
}

}  // namespace
}  // namespace sps
