// Weights as 8- or 4-bit codes with a scale for each group of columns.
#pragma once

#include <cstdint>

#include "sps/packed.h"

namespace sps {

// Columns of a block, the unit in which codes are stored; a group is whole blocks.
constexpr int kQuantBlock = 8;
// A group's scales: one bfloat16 for each of the panel's outputs.
constexpr int kQuantScaleBytes = 2 * kPanelOutputs;
// Columns that may share a scale, at most.
constexpr int kQuantMaxGroup = 256;
// Rows of x from which panels are widened once and multiplied as any others.
constexpr int kQuantManyRows = 48;

bool quantized(PackedKind kind);
int64_t quant_panel_bytes(const PackedLayout& layout);

// Rows [m_begin, m_begin + m) of x as a tile reads them; columns up to a whole block and rows beyond
// m are 0. Floats [columns][rows] (digits 0); or fixed point of one or two bytes, group by group
// (kernels/quant_fixed.h).
struct QuantRows {
  int64_t m_begin;
  int m, rows, digits;
  char* cells;
};

// As those of packed.h, for layouts that are quantized(). Weights must be finite: a group with one
// that is not has the scale NaN.
void quant_pack(const PackParams& params, int threads);
void quant_unpack(const PackParams& params);
void quant_linear(const PackedLinearParams& params, int threads);

}  // namespace sps
