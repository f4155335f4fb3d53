// y = x W^T over packed panels: few rows at the speed of memory, many at that of arithmetic.
#pragma once

#include "kernels/packed_tile.h"
#include "sps/scratch.h"

namespace sps {
namespace SPS_ISA_NS {

constexpr int kFewTotalRows = 16;                  // of which each panel is read from memory once
constexpr int64_t kPackedGroupBytes = 640 << 10;   // of panels in use and as many underway
constexpr int64_t kPackedCells = 640;              // of many rows, multiplied before going on
constexpr int64_t kPackedRowBytes = 448 << 10;     // of many rows, kept in the second-level cache
constexpr int64_t kPackedPanels = 64;              // whose sums are kept while cells are chunked

// Rows of x of one block, and the panels of the slice from its first column on.
struct PackedOperands {
  const char* x;
  int64_t x_stride, m, rows;  // m: where the first row goes in out
  const char* panels;
  int64_t panel_stride, cells;
};

static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

static inline int64_t chunks_of(int64_t n, int64_t most) {
  const int64_t chunks = (n + most - 1) / most;
  return chunks < 1 ? 1 : chunks;
}

// Rows of tile i of `tiles`, as equal as can be.
struct PackedRows {
  int64_t begin;
  int count;
  PackedRows(int64_t rows, int64_t tiles, int64_t i)
      : begin(rows * i / tiles), count(static_cast<int>(rows * (i + 1) / tiles - begin)) {}
};

static inline PackedTile tile_at(const PackedOperands& o, int64_t row, int64_t panel, int64_t cell,
                                 int64_t cells) {
  PackedTile t;
  t.x = o.x + row * o.x_stride + cell * 4;
  t.x_stride = o.x_stride;
  t.panel = o.panels + panel * o.panel_stride + cell * kPanelCellBytes;
  t.panel_stride = o.panel_stride;
  t.cells = cells;
  t.next = t.panel;
  t.add = cell > 0;
  return t;
}

static inline void store_tile(const PackedLinearParams& p, const PackedOperands& o,
                              const float* sums, PackedRows rows, int64_t panel, int panels) {
  const int64_t left = p.row_end - p.row_begin - panel * 16;
  store_packed(p, sums, panels * 16, o.m + rows.begin, rows.count, panel * 16,
               smaller(left, panels * 16));
}

// Panels [begin, end) group after group: while one is multiplied, the next one is asked for. That
// far ahead no prefetcher of the processor looks, and it stops at the end of every page.
template <class Cell>
static void packed_few(const PackedLinearParams& p, const PackedOperands& o, int64_t begin,
                       int64_t end) {
  const int64_t tiles = (o.rows + Cell::kRows - 1) / Cell::kRows;
  const int most = o.rows <= Cell::kFewRows ? Cell::kFewPanels : Cell::kPanels;
  alignas(64) float sums[kFewTotalRows * 16 * Cell::kFewPanels];
  int np = most;
  for (int64_t n = begin; n < end; n += np) {
    while (n + np > end) np = np > Cell::kPanels ? Cell::kPanels : 1;
    const int64_t chunks = chunks_of(o.cells, kPackedGroupBytes / (np * kPanelCellBytes));
    for (int64_t c = 0; c < chunks; ++c) {
      const int64_t c0 = o.cells * c / chunks, c1 = o.cells * (c + 1) / chunks;
      for (int64_t i = 0; i < tiles; ++i) {
        const PackedRows rows(o.rows, tiles, i);
        PackedTile t = tile_at(o, rows.begin, n, c0, c1 - c0);
        t.sums = sums + rows.begin * np * 16;
        if (i == 0)
          t.next = c + 1 < chunks ? t.panel + (c1 - c0) * kPanelCellBytes
                                  : o.panels + (n + np) * o.panel_stride;
        packed_tile_of<Cell>(rows.count, np)(t);
        if (c + 1 == chunks) store_tile(p, o, t.sums, rows, n, np);
      }
    }
  }
}

// Panels [begin, end), at most kPackedPanels unless `chunk` is all cells. A chunk of the rows stays
// in the second-level cache while panels pass by; with several chunks, `kept` holds the sums.
template <class Cell>
static void packed_many(const PackedLinearParams& p, const PackedOperands& o, int64_t begin,
                        int64_t end, int64_t chunks, float* kept) {
  const int64_t tiles = (o.rows + Cell::kRows - 1) / Cell::kRows;
  alignas(64) float sums[Cell::kRows * Cell::kPanels * 16];
  for (int64_t c = 0; c < chunks; ++c) {
    const int64_t c0 = o.cells * c / chunks, c1 = o.cells * (c + 1) / chunks;
    for (int64_t n = begin; n < end; n += Cell::kPanels) {
      const int np = n + Cell::kPanels <= end ? Cell::kPanels : 1;
      for (int64_t i = 0; i < tiles; ++i) {
        const PackedRows rows(o.rows, tiles, i);
        PackedTile t = tile_at(o, rows.begin, n, c0, c1 - c0);
        t.sums = chunks == 1 ? sums : kept + ((n - begin) * o.rows + rows.begin * np) * 16;
        if (i == 0) t.next = t.panel + np * o.panel_stride;
        packed_tile_of<Cell>(rows.count, np)(t);
        if (c + 1 == chunks) store_tile(p, o, t.sums, rows, n, np);
      }
    }
  }
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
  PackedOperands o;
  o.cells = (row_bytes + 3) / 4;
  o.panel_stride = panel_bytes(p.layout);
  o.panels = p.packed + p.row_begin / 16 * o.panel_stride +
             p.column_begin / (bf16 ? 2 : 1) * kPanelCellBytes;
  const int64_t m_count = b.m_end - b.m_begin;
  const bool few = m_count <= kFewTotalRows;
  const int64_t chunks = chunks_of(o.cells, kPackedCells);
  const int64_t fit = kPackedRowBytes * chunks / (4 * o.cells + 1) / Cell::kRows * Cell::kRows;
  const int64_t m_most = few ? m_count : fit < 2 * Cell::kRows ? 2 * Cell::kRows : fit;
  const int64_t m_step = smaller(m_most, m_count);
  const int64_t kept_bytes = few || chunks == 1 ? 0 : m_step * kPackedPanels * 64;
  const bool copied = row_bytes % 4 != 0 || (p.x_stride % 2048 == 0 && m_count > 8);
  const int64_t copy_stride = (row_bytes + 63) / 64 * 64 + (row_bytes % 128 == 0 ? 64 : 0);
  const int64_t scratch_bytes = kept_bytes + (copied ? m_step * copy_stride : 0);
  char* scratch = nullptr;
  if (scratch_bytes > 0)
    scratch = static_cast<char*>(thread_scratch(static_cast<size_t>(scratch_bytes)));
  const int64_t n_step = chunks == 1 ? b.panel_end - b.panel_begin : kPackedPanels;
  for (o.m = b.m_begin; o.m < b.m_end; o.m += m_step) {
    o.rows = smaller(m_step, b.m_end - o.m);
    o.x = p.x + o.m * p.x_stride;
    o.x_stride = p.x_stride;
    if (copied) {
      copy_rows(o.x, p.x_stride, row_bytes, o.rows, scratch + kept_bytes, copy_stride);
      o.x = scratch + kept_bytes;
      o.x_stride = copy_stride;
    }
    if (few) {
      packed_few<Cell>(p, o, b.panel_begin, b.panel_end);
      continue;
    }
    for (int64_t n = b.panel_begin; n < b.panel_end; n += n_step)
      packed_many<Cell>(p, o, n, smaller(n + n_step, b.panel_end), chunks,
                        reinterpret_cast<float*>(scratch));
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
