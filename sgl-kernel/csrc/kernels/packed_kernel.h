// y = x W^T over packed panels: a tile is some rows of x times one or two panels, summed over k in
// order, so that a row's result depends neither on the other rows, nor on how work is cut.
#pragma once

#include <utility>

#include "kernels/packed_cells.h"
#include "sps/packed.h"
#include "sps/scratch.h"

namespace sps {
namespace SPS_ISA_NS {

// Strides in bytes; sums [MR, 16 * NP] with a stride in floats. `add`: go on from what sums hold.
struct PackedTile {
  const char* x;
  int64_t x_stride;
  const char* panel;
  int64_t panel_stride, cells;
  float* sums;
  int64_t sums_stride;
  bool add;
};

constexpr int64_t kPrefetchBytes = 1024;

// Rows are reached from a pointer per three of them: there are not enough registers for one each.
template <class Cell, int MR, int NP>
static void packed_tile(const PackedTile& t) {
  constexpr int kRegs = kPanelRegs, kTriples = (MR + 2) / 3;
  Wide::reg acc[MR * NP * kRegs];
#pragma GCC unroll 64
  for (int i = 0; i < MR * NP * kRegs; ++i) acc[i] = Wide::zero();
  if (t.add) {
#pragma GCC unroll 64
    for (int i = 0; i < MR * NP * kRegs; ++i)
      acc[i] = Wide::load(t.sums + i / (NP * kRegs) * t.sums_stride + i % (NP * kRegs) * Wide::W);
  }
  const int64_t stride = t.x_stride;
  const char* x[kTriples];
#pragma GCC unroll 8
  for (int i = 0; i < kTriples; ++i) x[i] = t.x + 3 * i * stride;
  const char* panel = t.panel;
  const char* const end = panel + t.cells * kPanelCellBytes;
  for (; panel != end; panel += kPanelCellBytes) {
    Wide::reg w[NP][Cell::kWeightRegs];
#pragma GCC unroll 2
    for (int n = 0; n < NP; ++n) {
      Cell::load(panel + n * t.panel_stride, w[n]);
      __builtin_prefetch(panel + n * t.panel_stride + kPrefetchBytes);
    }
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m) {
      Wide::reg cell[Cell::kXRegs];
      Cell::broadcast(x[m / 3] + m % 3 * stride, cell);
#pragma GCC unroll 2
      for (int n = 0; n < NP; ++n) Cell::dot(w[n], cell, acc + (m * NP + n) * kRegs);
    }
#pragma GCC unroll 8
    for (int i = 0; i < kTriples; ++i) x[i] += 4;
  }
#pragma GCC unroll 64
  for (int i = 0; i < MR * NP * kRegs; ++i)
    Wide::store(t.sums + i / (NP * kRegs) * t.sums_stride + i % (NP * kRegs) * Wide::W, acc[i]);
}

using PackedTileFn = void (*)(const PackedTile&);

// Tiles of 1 .. Cell::kRows rows.
template <class Cell, int NP, int... I>
static PackedTileFn packed_tile_of(int rows, std::integer_sequence<int, I...>) {
  static constexpr PackedTileFn tiles[] = {packed_tile<Cell, I + 1, NP>...};
  return tiles[rows - 1];
}

template <class Cell>
static PackedTileFn packed_tile_of(int rows, int panels) {
  using Rows = std::make_integer_sequence<int, Cell::kRows>;
  return panels == Cell::kPanels ? packed_tile_of<Cell, Cell::kPanels>(rows, Rows{})
                                 : packed_tile_of<Cell, 1>(rows, Rows{});
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

constexpr int64_t kPackedCells = 640;         // of a row that are multiplied before going on
constexpr int64_t kPackedRowBytes = 448 << 10;  // of x that are kept in the second-level cache
constexpr int64_t kPackedPanels = 64;         // whose sums are kept while cells are chunked

// How one block is walked: all of k at once, or in chunks whose sums wait in scratch memory.
struct PackedWalk {
  const char* x;  // row m_begin of the block
  int64_t x_stride;
  const char* panels;  // panel 0 of the slice, at its first column
  int64_t panel_stride, cells, chunk, rows;
  float* sums;
};

// Rows [m0, m1) times panels [n0, n1), counted from the block's first row and the slice's first.
template <class Cell>
static void packed_walk(const PackedLinearParams& p, const PackedWalk& w, int64_t m_begin,
                        const PackedBlock& b) {
  const int64_t m_count = b.m_end - b.m_begin, tiles = (m_count + Cell::kRows - 1) / Cell::kRows;
  const bool whole = w.chunk >= w.cells;
  const int64_t outputs = p.row_end - p.row_begin;
  alignas(64) float tile_sums[Cell::kRows * Cell::kPanels * 16];
  int64_t c = 0;
  do {
    const int64_t cells = c + w.chunk < w.cells ? w.chunk : w.cells - c;
    const bool last = c + cells == w.cells;
    for (int64_t n = b.panel_begin; n < b.panel_end; n += Cell::kPanels) {
      const int np = n + Cell::kPanels <= b.panel_end ? Cell::kPanels : 1;
      for (int64_t i = 0; i < tiles; ++i) {
        const int64_t m0 = m_count * i / tiles, m1 = m_count * (i + 1) / tiles;
        const int rows = static_cast<int>(m1 - m0);
        PackedTile t;
        t.x = w.x + (b.m_begin + m0) * w.x_stride + c * 4;
        t.x_stride = w.x_stride;
        t.panel = w.panels + n * w.panel_stride + c * kPanelCellBytes;
        t.panel_stride = w.panel_stride;
        t.cells = cells;
        t.sums = whole ? tile_sums : w.sums + m0 * kPackedPanels * 16 + (n - b.panel_begin) * 16;
        t.sums_stride = whole ? Cell::kPanels * 16 : kPackedPanels * 16;
        t.add = c > 0;
        packed_tile_of<Cell>(rows, np)(t);
        if (!last) continue;
        const int64_t left = outputs - n * 16, count = left < np * 16 ? left : np * 16;
        store_packed(p, t.sums, t.sums_stride, m_begin + b.m_begin + m0, rows, n * 16, count);
      }
    }
    c += cells;
  } while (c < w.cells);
}

// Copies rows so that they end in whole cells and do not fall into the same lines of the cache.
static void copy_rows(const char* x, int64_t x_stride, int64_t bytes, int64_t rows, char* to,
                      int64_t to_stride) {
  for (int64_t m = 0; m < rows; ++m) {
    std::memcpy(to + m * to_stride, x + m * x_stride, static_cast<size_t>(bytes));
    std::memset(to + m * to_stride + bytes, 0, static_cast<size_t>(to_stride - bytes));
  }
}

template <class Cell>
static void packed_block(const PackedLinearParams& p, const PackedBlock& b) {
  const bool bf16 = Cell::kKind == PackedKind::kBf16;
  const int64_t row_bytes = (p.column_end - p.column_begin) * (bf16 ? 2 : 4);
  PackedWalk w;
  w.cells = (row_bytes + 3) / 4;
  const int64_t chunks = (w.cells + kPackedCells - 1) / kPackedCells;
  const bool few = b.m_end - b.m_begin <= 16 || chunks < 2;
  w.chunk = few ? w.cells : (w.cells + chunks - 1) / chunks;
  w.panel_stride = panel_bytes(p.layout);
  w.panels = p.packed + p.row_begin / 16 * w.panel_stride +
             p.column_begin / (bf16 ? 2 : 1) * kPanelCellBytes;
  w.rows = kPackedRowBytes / (4 * w.chunk + 1) / Cell::kRows * Cell::kRows;
  if (w.rows < 2 * Cell::kRows) w.rows = 2 * Cell::kRows;
  const int64_t sum_bytes = few ? 0 : w.rows * kPackedPanels * 64;
  const bool copied = row_bytes % 4 != 0 || (p.x_stride % 2048 == 0 && b.m_end - b.m_begin > 8);
  const int64_t copy_stride = (row_bytes + 63) / 64 * 64 + (row_bytes % 128 == 0 ? 64 : 0);
  const int64_t most = b.m_end - b.m_begin < w.rows ? b.m_end - b.m_begin : w.rows;
  char* scratch = nullptr;
  if (sum_bytes > 0 || copied)
    scratch = static_cast<char*>(
        thread_scratch(static_cast<size_t>(sum_bytes + (copied ? most * copy_stride : 0))));
  w.sums = reinterpret_cast<float*>(scratch);
  const int64_t step = few ? b.panel_end - b.panel_begin : kPackedPanels;
  for (int64_t m = b.m_begin; m < b.m_end; m += w.rows) {
    const int64_t rows = m + w.rows < b.m_end ? w.rows : b.m_end - m;
    w.x = p.x + m * p.x_stride;
    w.x_stride = p.x_stride;
    if (copied) {
      copy_rows(w.x, p.x_stride, row_bytes, rows, scratch + sum_bytes, copy_stride);
      w.x = scratch + sum_bytes;
      w.x_stride = copy_stride;
    }
    for (int64_t n = b.panel_begin; n < b.panel_end; n += step) {
      const int64_t n_end = n + step < b.panel_end ? n + step : b.panel_end;
      packed_walk<Cell>(p, w, m, PackedBlock{0, rows, n, n_end});
    }
  }
}

static void packed_linear_block(const PackedLinearParams& p, const PackedBlock& b) {
  if (p.layout.kind == PackedKind::kBf16)
    packed_block<PackedCellBf16>(p, b);
  else
    packed_block<CellF32>(p, b);
}

}  // namespace SPS_ISA_NS
}  // namespace sps
