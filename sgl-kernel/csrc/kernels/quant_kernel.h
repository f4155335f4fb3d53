// Products of a few rows of x with quantized panels: rows made ready for a tile, tiles for panels.
#pragma once

#include "kernels/quant_fixed.h"
#include "kernels/quant_tile.h"

namespace sps {
namespace SPS_ISA_NS {

using QuantTileFn = const char* (*)(const QuantTile&);

struct QuantTileSize {
  int rows, digits;
  QuantTileFn fn;
};

#ifdef SPS_WIDE_REGISTERS
constexpr int kQuantMostRows = 12;
#define SPS_QUANT_TILES(size, C) \
  {size<C, 1>(), size<C, 2>(), size<C, 3>(), size<C, 4>(), size<C, 6>(), size<C, 8>(), \
   size<C, 10>(), size<C, 12>()}
#else
constexpr int kQuantMostRows = 4;
#define SPS_QUANT_TILES(size, C) {size<C, 1>(), size<C, 2>(), size<C, 3>(), size<C, 4>()}
#endif

template <class Cells, int kRows>
constexpr QuantTileSize float_size() {
  return {kRows, 0, quant_tile<Cells, kRows>};
}

#ifdef SPS_HAS_VNNI
template <class Codes, int kRows>
constexpr QuantTileSize fixed_size() {
  return {kRows, Codes::digits(kRows), fixed_tile<Codes, kRows>};
}
#endif

// The smallest tile of at least m rows, else the largest.
template <size_t kSizes>
static QuantTileSize smallest_tile(const QuantTileSize (&sizes)[kSizes], int64_t m) {
  QuantTileSize best{};
  for (const QuantTileSize& size : sizes) {
    best = size;
    if (size.rows >= m) break;
  }
  return best;
}

// bfloat16 is taken in fixed point where there are instructions for it; float32 stays what it is.
static QuantTileSize quant_tile_for(const PackedLinearParams& p, int64_t m) {
  const bool int8 = p.layout.kind == PackedKind::kInt8;
#ifdef SPS_HAS_VNNI
  static constexpr QuantTileSize int8_fixed[] = SPS_QUANT_TILES(fixed_size, Int8Bytes);
  static constexpr QuantTileSize int4_fixed[] = SPS_QUANT_TILES(fixed_size, Int4Bytes);
  if (p.x_bf16) return smallest_tile(int8 ? int8_fixed : int4_fixed, m);
#endif
  static constexpr QuantTileSize int8_floats[] = SPS_QUANT_TILES(float_size, Int8AsF32);
  static constexpr QuantTileSize int4_floats[] = SPS_QUANT_TILES(float_size, Int4AsF32);
  return smallest_tile(int8 ? int8_floats : int4_floats, m);
}

// Rows of x from m_begin that one tile takes; `cells` is left to the caller.
static QuantRows quant_rows(const PackedLinearParams& p, int64_t m_begin) {
  const int64_t left = p.m - m_begin;
  const int64_t tiles = (left + kQuantMostRows - 1) / kQuantMostRows, m = (left + tiles - 1) / tiles;
  const QuantTileSize tile = quant_tile_for(p, m);
  return {m_begin, static_cast<int>(m), tile.rows, tile.digits, nullptr};
}

static void quant_fill_rows(const PackedLinearParams& p, const QuantRows& rows) {
#ifdef SPS_HAS_VNNI
  if (rows.digits > 0) return fill_fixed(p, rows);
#endif
  const int64_t k = packed_columns(p);
  const int64_t padded = (k + kQuantBlock - 1) / kQuantBlock * kQuantBlock;
  const int64_t step = 4 * rows.rows;
  __builtin_memset(rows.cells, 0, static_cast<size_t>(padded * step));
  for (int r = 0; r < rows.m; ++r) {
    const char* x = p.x + (rows.m_begin + r) * p.x_stride;
    char* to = rows.cells + 4 * r;
    for (int64_t c = 0; c < k; ++c, to += step) {
      const float v = p.x_bf16 ? RegBf16AsF32::scalar(x + 2 * c) : RegF32::scalar(x + 4 * c);
      __builtin_memcpy(to, &v, 4);
    }
  }
}

// Sums of one row and one panel, with the bias, where they belong.
static void quant_store(const PackedLinearParams& p, int64_t m, int64_t n, const float* sums) {
  const int64_t outputs = p.row_end - p.row_begin;
  const int count = static_cast<int>(outputs - n < kPanelOutputs ? outputs - n : kPanelOutputs);
  float y[kPanelOutputs];
  for (int i = 0; i < kPanelOutputs; ++i) y[i] = sums[i];
  if (p.bias != nullptr)
    for (int i = 0; i < count; ++i)
      y[i] += p.bias_bf16 ? RegBf16AsF32::scalar(p.bias + 2 * (n + i))
                          : RegF32::scalar(p.bias + 4 * (n + i));
  char* out = p.out + m * p.out_stride + n * (p.out_bf16 ? 2 : 4);
  if (!p.out_bf16) {
    __builtin_memcpy(out, y, 4 * static_cast<size_t>(count));
    return;
  }
  char h[2 * kPanelOutputs];
  for (int i = 0; i < kPanelOutputs; i += Wide::W) Wide::store_bf16(h + 2 * i, Wide::load(y + i));
  __builtin_memcpy(out, h, 2 * static_cast<size_t>(count));
}

// Panels [begin, end), counted from row_begin.
static void quant_panels(const PackedLinearParams& p, const QuantRows& rows, int64_t begin,
                         int64_t end) {
  const QuantTileSize tile = quant_tile_for(p, rows.m);
  alignas(64) float sums[kQuantMostRows * kPanelOutputs];
  for (int64_t i = begin; i < end; ++i) {
    QuantTile t{};
    t.cells = rows.cells;
    t.sums = sums;
    for (const PackedPiece& piece : p.pieces) {
      t.layout = &piece.layout;
      t.panel = piece.packed + (p.row_begin / kPanelOutputs + i) * piece.panel_stride;
      t.first_group = piece.column_begin / piece.layout.group;
      t.blocks = (piece.column_end - piece.column_begin + kQuantBlock - 1) / kQuantBlock;
      t.cells = tile.fn(t);
      t.add = true;
    }
    for (int r = 0; r < rows.m; ++r)
      quant_store(p, rows.m_begin + r, i * kPanelOutputs, sums + r * kPanelOutputs);
  }
}

}  // namespace SPS_ISA_NS
}  // namespace sps
