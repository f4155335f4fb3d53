// Many rows of x: panels are widened into scratch memory once, scaled, and multiplied as panels of
// bfloat16 (or float32, for such x) are. Only here are scaled weights rounded, to bfloat16.
#pragma once

#include "kernels/packed_kernel.h"
#include "kernels/quant_cells.h"
#include "sps/scratch.h"

namespace sps {
namespace SPS_ISA_NS {

static void store_bf16_pairs(char* to, const Wide::reg* even, const Wide::reg* odd) {
#ifdef SPS_HAS_DPBF16
  ModeBf16::store_pair<Wide>(reinterpret_cast<float*>(to), 0, 0, *even, *odd);
#else
  uint16_t pairs[2][kPanelOutputs], cells[2 * kPanelOutputs];
  for (int i = 0; i < kQuantRegs; ++i) {
    Wide::store_bf16(pairs[0] + i * Wide::W, even[i]);
    Wide::store_bf16(pairs[1] + i * Wide::W, odd[i]);
  }
  for (int i = 0; i < kPanelOutputs; ++i) {
    cells[2 * i] = pairs[0][i];
    cells[2 * i + 1] = pairs[1][i];
  }
  __builtin_memcpy(to, cells, sizeof cells);
#endif
}

// Columns of one panel from a group on, as cells of `to`, which has room for whole blocks.
template <class Cells>
static void widen_panel(const PackedLayout& layout, const char* panel, int64_t first_group,
                        int64_t columns, bool bf16, char* to) {
  const int64_t group_blocks = layout.group / kQuantBlock;
  for (int64_t b = 0; b * kQuantBlock < columns; ++b) {
    const int64_t group = first_group + b / group_blocks;
    const char* scale = panel + quant_scales_at(layout, group);
    const Cells block(panel + quant_codes_at(layout, group) + b % group_blocks * Cells::kBytes);
#pragma GCC unroll 4
    for (int step = 0; step < kQuantBlock; step += 2) {
      Wide::reg w[2][kQuantRegs];
      for (int c = 0; c < 2; ++c) {
        block.weights(step + c, w[c]);
        for (int i = 0; i < kQuantRegs; ++i)
          w[c][i] = Wide::mul(w[c][i], Wide::load_bf16(scale + 2 * i * Wide::W));
      }
      if (bf16) {
        store_bf16_pairs(to, w[0], w[1]);
        to += kPanelCellBytes;
        continue;
      }
      for (int c = 0; c < 2; ++c, to += kPanelCellBytes)
        for (int i = 0; i < kQuantRegs; ++i) Wide::store(to + 4 * i * Wide::W, w[c][i]);
    }
  }
}

// All that is wanted of one panel.
static void widen_pieces(const PackedLinearParams& p, int64_t index, char* to) {
  const bool int8 = p.layout.kind == PackedKind::kInt8;
  const auto widen = int8 ? widen_panel<Int8AsF32> : widen_panel<Int4AsF32>;
  for (const PackedPiece& piece : p.pieces) {
    const int64_t columns = piece.column_end - piece.column_begin;
    const char* panel = piece.packed + index * piece.panel_stride;
    widen(piece.layout, panel, piece.column_begin / piece.layout.group, columns, p.x_bf16, to);
    to += columns / (p.x_bf16 ? 2 : 1) * kPanelCellBytes;
  }
}

constexpr int64_t kWidenedBytes = 512 << 10;
constexpr int64_t kWidenedPanels = 4;  // at least

static void quant_many(const PackedLinearParams& p, int64_t begin, int64_t end) {
  PackedLinearParams wide = p;
  wide.layout.kind = p.x_bf16 ? PackedKind::kBf16 : PackedKind::kF32;
  wide.layout.k = packed_columns(p);
  wide.row_begin = 0;
  const int64_t stride = panel_bytes(wide.layout);
  const int64_t fit = kWidenedBytes / (stride + 1) / 2 * 2;
  const int64_t step = fit > kWidenedPanels ? fit : kWidenedPanels;
  char* scratch = static_cast<char*>(
      thread_scratch(static_cast<size_t>(step * stride + 8 * kPanelCellBytes), 1));
  wide.pieces = {{wide.layout, stride, scratch, 0, wide.layout.k}};
  const int64_t outputs = p.row_end - p.row_begin;
  for (int64_t n = begin; n < end; n += step) {
    const int64_t count = n + step < end ? step : end - n;
    for (int64_t i = 0; i < count; ++i)
      widen_pieces(p, p.row_begin / kPanelOutputs + n + i, scratch + i * stride);
    const int64_t left = outputs - n * kPanelOutputs;
    wide.row_end = left < count * kPanelOutputs ? left : count * kPanelOutputs;
    wide.bias = p.bias == nullptr ? nullptr : p.bias + n * kPanelOutputs * (p.bias_bf16 ? 2 : 4);
    wide.out = p.out + n * kPanelOutputs * (p.out_bf16 ? 2 : 4);
    packed_linear_block(wide, PackedBlock{0, p.m, 0, count});
  }
}

}  // namespace SPS_ISA_NS
}  // namespace sps
