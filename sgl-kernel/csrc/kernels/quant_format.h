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

// A panel is read from front to end: the scales of two groups (64 bytes: so that codes stay aligned),
// the blocks of the first group, those of the second, and so on. An int8 block is
// [2][16 outputs][4 columns] bytes. An int4 block is 32 bits for each output: the first four columns
// in the lower nibbles of its bytes, the other four in the upper ones.
constexpr int int4_shift(int column) { return 8 * (column % 4) + 4 * (column / 4); }
inline int int8_offset(int column, int output) {
  return column / 4 * 64 + 4 * output + column % 4;
}

inline int64_t quant_block_bytes(PackedKind kind) {
  return kQuantBlock * kPanelOutputs / (kind == PackedKind::kInt8 ? 1 : 2);
}

// Where a group's codes and scales begin in its panel.
inline int64_t quant_codes_at(const PackedLayout& layout, int64_t group) {
  const int64_t bytes = layout.group / kQuantBlock * quant_block_bytes(layout.kind);
  return (group / 2 + 1) * 2 * kQuantScaleBytes + group * bytes;
}

inline int64_t quant_scales_at(const PackedLayout& layout, int64_t group) {
  return quant_codes_at(layout, group / 2 * 2) - (2 - group % 2) * kQuantScaleBytes;
}

inline int quant_code(PackedKind kind, const char* block, int column, int output) {
  if (kind == PackedKind::kInt8) {
    int8_t code;
    __builtin_memcpy(&code, block + int8_offset(column, output), 1);
    return code;
  }
  uint32_t nibbles;
  __builtin_memcpy(&nibbles, block + 4 * output, 4);
  return kInt4Values[(nibbles >> int4_shift(column)) & 15];
}

inline float quant_scale(const char* scales, int output) {
  uint16_t h;
  __builtin_memcpy(&h, scales + 2 * output, 2);
  return bf16_to_float(h);
}

}  // namespace
}  // namespace sps
