// A tile: some rows of x times a few panels, summed over k in order, so that a row's result depends
// neither on the other rows, nor on how work is cut.
#pragma once

#include <utility>

#include "kernels/packed_cells.h"
#include "sps/packed.h"

namespace sps {
namespace SPS_ISA_NS {

// Strides in bytes; sums [MR, 16 * NP], contiguous. `add`: go on from what sums hold. `next`: what
// will be read after this tile, as far apart as its panels; brought to the second-level cache.
struct PackedTile {
  const char* x;
  int64_t x_stride;
  const char* panel;
  int64_t panel_stride, cells;
  const char* next;
  float* sums;
  bool add;
};

// Rows are reached from a pointer per three of them: there are not enough registers for one each.
template <class Cell, int MR, int NP>
static void packed_tile(const PackedTile& t) {
  constexpr int kAll = MR * NP * kPanelRegs, kTriples = (MR + 2) / 3;
  const int64_t stride = t.x_stride, panel_stride = t.panel_stride;
  float* const sums = t.sums;
  Wide::reg acc[kAll];
#pragma GCC unroll 64
  for (int i = 0; i < kAll; ++i) acc[i] = Wide::zero();
  if (t.add) {
#pragma GCC unroll 64
    for (int i = 0; i < kAll; ++i) acc[i] = Wide::load(sums + i * Wide::W);
  }
  const char* x[kTriples];
#pragma GCC unroll 8
  for (int i = 0; i < kTriples; ++i) x[i] = t.x + 3 * i * stride;
  const char *panel = t.panel, *next = t.next;
  const char* const end = panel + t.cells * kPanelCellBytes;
  for (; panel != end; panel += kPanelCellBytes, next += kPanelCellBytes) {
    Wide::reg w[NP][Cell::kWeightRegs];
#pragma GCC unroll 4
    for (int n = 0; n < NP; ++n) {
      Cell::load(panel + n * panel_stride, w[n]);
      __builtin_prefetch(next + n * panel_stride, 0, 2);
    }
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m) {
      Wide::reg cell[Cell::kXRegs];
      Cell::broadcast(x[m / 3] + m % 3 * stride, cell);
#pragma GCC unroll 4
      for (int n = 0; n < NP; ++n) Cell::dot(w[n], cell, acc + (m * NP + n) * kPanelRegs);
    }
#pragma GCC unroll 8
    for (int i = 0; i < kTriples; ++i) x[i] += 4;
  }
#pragma GCC unroll 64
  for (int i = 0; i < kAll; ++i) Wide::store(sums + i * Wide::W, acc[i]);
}

using PackedTileFn = void (*)(const PackedTile&);

template <class Cell, int NP, int... I>
static PackedTileFn packed_tile_in(int rows, std::integer_sequence<int, I...>) {
  static constexpr PackedTileFn tiles[] = {packed_tile<Cell, I + 1, NP>...};
  return tiles[rows - 1];
}

// Tiles of 1 .. Cell::kRows rows times 1 or Cell::kPanels panels; of few rows, more panels.
template <class Cell>
static PackedTileFn packed_tile_of(int rows, int panels) {
  using Rows = std::make_integer_sequence<int, Cell::kRows>;
  if (panels == 1) return packed_tile_in<Cell, 1>(rows, Rows{});
  if constexpr (Cell::kFewPanels > Cell::kPanels) {
    using Few = std::make_integer_sequence<int, Cell::kFewRows>;
    if (panels == Cell::kFewPanels) return packed_tile_in<Cell, Cell::kFewPanels>(rows, Few{});
  }
  return packed_tile_in<Cell, Cell::kPanels>(rows, Rows{});
}

// Rows [m, m + rows) and outputs [n, n + count) of out, n counted from row_begin.
static void store_packed(const PackedLinearParams& p, const float* sums, int64_t sums_stride,
                         int64_t m, int rows, int64_t n, int64_t count) {
  const int item = p.out_bf16 ? 2 : 4, bias_item = p.bias_bf16 ? 2 : 4;
  for (int r = 0; r < rows; ++r) {
    char* out = p.out + (m + r) * p.out_stride + n * item;
    const float* y = sums + r * sums_stride;
    int64_t i = 0;
    for (; i + Wide::W <= count; i += Wide::W) {
      Wide::reg v = Wide::load(y + i);
      if (p.bias != nullptr) {
        const char* bias = p.bias + (n + i) * bias_item;
        v = Wide::add(v, p.bias_bf16 ? Wide::load_bf16(bias) : Wide::load(bias));
      }
      if (p.out_bf16)
        Wide::store_bf16(out + 2 * i, v);
      else
        Wide::store(out + 4 * i, v);
    }
    for (; i < count; ++i) {
      float v = y[i];
      if (p.bias != nullptr) {
        const char* bias = p.bias + (n + i) * bias_item;
        v += p.bias_bf16 ? RegBf16AsF32::scalar(bias) : RegF32::scalar(bias);
      }
      const uint16_t h = float_to_bf16(v);
      if (p.out_bf16)
        __builtin_memcpy(out + 2 * i, &h, 2);
      else
        __builtin_memcpy(out + 4 * i, &v, 4);
    }
  }
}

}  // namespace SPS_ISA_NS
}  // namespace sps
