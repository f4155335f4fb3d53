// y = x W^T over packed panels: few rows at the speed of memory, many at that of arithmetic.
#pragma once

#include "kernels/packed_tile.h"
#include "sps/scratch.h"

namespace sps {
namespace SPS_ISA_NS {

constexpr int kFewTotalRows = 16;                  // of which each panel is read from memory once
constexpr int kAskingRows = 5;                     // from which on panels are asked for ahead
constexpr int64_t kPackedGroupBytes = 640 << 10;   // of panels in use and as many underway
constexpr int64_t kPackedCells = 640;              // of many rows, multiplied before going on
constexpr int64_t kPackedRowBytes = 448 << 10;     // of many rows, kept in the second-level cache
constexpr int64_t kPackedPanels = 64;              // whose sums are kept while cells are chunked

// Rows of x of one block; m: where the first one goes in out.
struct PackedOperands {
  const char* x;
  int64_t x_stride, m, rows;
};

static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

static inline int64_t chunks_of(int64_t n, int64_t most) {
  const int64_t chunks = (n + most - 1) / most;
  return chunks < 1 ? 1 : chunks;
}

// Cells that are multiplied together: of x from x_cell on, and the same of panels.
struct PackedChunk {
  const char* panels;  // the first of the rows that are wanted
  int64_t panel_stride, x_cell, cells;
  bool first, last;       // of the product
  bool last_of_piece;
};

static inline int64_t cells_of(const PackedPiece& piece) {
  const int64_t item = piece.layout.kind == PackedKind::kBf16 ? 2 : 4;
  return ((piece.column_end - piece.column_begin) * item + 3) / 4;
}

static inline int64_t chunks_of(const PackedLinearParams& p, int64_t most) {
  int64_t chunks = 0;
  for (const PackedPiece& piece : p.pieces) chunks += chunks_of(cells_of(piece), most);
  return chunks;
}

// Calls f with chunks of at most `most` cells, in order.
template <class F>
static void over_chunks(const PackedLinearParams& p, int64_t most, F&& f) {
  int64_t x_cell = 0;
  for (size_t i = 0; i < p.pieces.size(); ++i) {
    const PackedPiece& piece = p.pieces[i];
    const int64_t cells = cells_of(piece), chunks = chunks_of(cells, most);
    const int64_t per_cell = piece.layout.kind == PackedKind::kBf16 ? 2 : 1;
    PackedChunk chunk{};
    chunk.panel_stride = piece.panel_stride;
    const char* const panels = piece.packed + p.row_begin / 16 * chunk.panel_stride +
                               piece.column_begin / per_cell * kPanelCellBytes;
    for (int64_t c = 0; c < chunks; ++c) {
      const int64_t c0 = cells * c / chunks;
      chunk.panels = panels + c0 * kPanelCellBytes;
      chunk.x_cell = x_cell + c0;
      chunk.cells = cells * (c + 1) / chunks - c0;
      chunk.first = i == 0 && c == 0;
      chunk.last_of_piece = c + 1 == chunks;
      chunk.last = chunk.last_of_piece && i + 1 == p.pieces.size();
      f(chunk);
    }
    x_cell += cells;
  }
}

// Rows of tile i of `tiles`, as equal as can be.
struct PackedRows {
  int64_t begin;
  int count;
  PackedRows(int64_t rows, int64_t tiles, int64_t i)
      : begin(rows * i / tiles), count(static_cast<int>(rows * (i + 1) / tiles - begin)) {}
};

static inline PackedTile tile_at(const PackedOperands& o, int64_t row, const PackedChunk& chunk,
                                 int64_t panel) {
  PackedTile t;
  t.x = o.x + row * o.x_stride + chunk.x_cell * 4;
  t.x_stride = o.x_stride;
  t.panel = chunk.panels + panel * chunk.panel_stride;
  t.panel_stride = chunk.panel_stride;
  t.cells = chunk.cells;
  t.next = t.panel;
  t.add = !chunk.first;
  return t;
}

static inline void store_tile(const PackedLinearParams& p, const PackedOperands& o,
                              const float* sums, PackedRows rows, int64_t panel, int panels) {
  const int64_t left = p.row_end - p.row_begin - panel * 16;
  store_packed(p, sums, panels * 16, o.m + rows.begin, rows.count, panel * 16,
               smaller(left, panels * 16));
}

// Panels [begin, end) group after group. With some rows the whole next group is asked for while one
// is multiplied: that far ahead no prefetcher of the processor looks, and it stops at the end of
// every page. Fewer rows only wait for memory, and asking hinders it; one row leaves it a single
// stream, which is fastest.
template <class Cell>
static void packed_few(const PackedLinearParams& p, const PackedOperands& o, int64_t begin,
                       int64_t end) {
  const int64_t tiles = (o.rows + Cell::kRows - 1) / Cell::kRows;
  const int some = o.rows <= Cell::kFewRows ? Cell::kFewPanels : Cell::kPanels;
  const int most = o.rows == 1 ? Cell::kOneRowPanels : some;
  alignas(64) float sums[kFewTotalRows * 16 * Cell::kFewPanels];
  int np = most;
  for (int64_t n = begin; n < end; n += np) {
    while (n + np > end) np = np > Cell::kPanels ? Cell::kPanels : 1;
    over_chunks(p, kPackedGroupBytes / (np * kPanelCellBytes), [&](const PackedChunk& chunk) {
      for (int64_t i = 0; i < tiles; ++i) {
        const PackedRows rows(o.rows, tiles, i);
        PackedTile t = tile_at(o, rows.begin, chunk, n);
        t.sums = sums + rows.begin * np * 16;
        if (i == 0 && o.rows >= kAskingRows)
          t.next += chunk.last_of_piece ? np * chunk.panel_stride : chunk.cells * kPanelCellBytes;
        packed_tile_of<Cell>(rows.count, np)(t);
        if (chunk.last) store_tile(p, o, t.sums, rows, n, np);
      }
    });
  }
}

// Panels [begin, end), at most kPackedPanels unless `kept` is null. A chunk of the rows stays in
// the second-level cache while panels pass by; with several chunks, `kept` holds the sums.
template <class Cell>
static void packed_many(const PackedLinearParams& p, const PackedOperands& o, int64_t begin,
                        int64_t end, float* kept) {
  const int64_t tiles = (o.rows + Cell::kRows - 1) / Cell::kRows;
  alignas(64) float sums[Cell::kRows * Cell::kPanels * 16];
  over_chunks(p, kPackedCells, [&](const PackedChunk& chunk) {
    for (int64_t n = begin; n < end; n += Cell::kPanels) {
      const int np = n + Cell::kPanels <= end ? Cell::kPanels : 1;
      for (int64_t i = 0; i < tiles; ++i) {
        const PackedRows rows(o.rows, tiles, i);
        PackedTile t = tile_at(o, rows.begin, chunk, n);
        t.sums = kept == nullptr ? sums : kept + ((n - begin) * o.rows + rows.begin * np) * 16;
        if (i == 0) t.next = t.panel + np * chunk.panel_stride;
        packed_tile_of<Cell>(rows.count, np)(t);
        if (chunk.last) store_tile(p, o, t.sums, rows, n, np);
      }
    }
  });
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
  const int64_t row_bytes = packed_columns(p) * (bf16 ? 2 : 4), cells = (row_bytes + 3) / 4;
  PackedOperands o;
  const int64_t m_count = b.m_end - b.m_begin;
  const bool few = m_count <= kFewTotalRows;
  const int64_t chunks = chunks_of(p, kPackedCells);
  const int64_t fit = kPackedRowBytes * chunks / (4 * cells + 1) / Cell::kRows * Cell::kRows;
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
      packed_many<Cell>(p, o, n, smaller(n + n_step, b.panel_end),
                        chunks == 1 ? nullptr : reinterpret_cast<float*>(scratch));
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
