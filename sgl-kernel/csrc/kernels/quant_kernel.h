// Products of a few rows of x with quantized panels: each block is decoded once, in registers, for
// up to 16 rows. Codes are summed within a group, and the group's sum is scaled in float32.
#pragma once

#include "kernels/quant_cells.h"

namespace sps {
namespace SPS_ISA_NS {

struct QuantTile {
  const char *codes, *scales, *cells;
  int64_t blocks, group_blocks;
  float* sums;  // [rows][16]
};

// Independent sums of each number, so that additions need not wait for one another.
constexpr int quant_chains(int rows) {
  const int registers = rows * kQuantRegs;
  return registers <= 4 ? 4 : registers <= 8 ? 2 : 1;
}

template <class Cells, int kRows>
static void quant_tile(const QuantTile& t) {
  constexpr int kChains = quant_chains(kRows), kSums = kRows * kQuantRegs;
  Wide::reg total[kSums];
#pragma GCC unroll 32
  for (int i = 0; i < kSums; ++i) total[i] = Wide::zero();
  const char *codes = t.codes, *scales = t.scales, *x = t.cells;
  for (int64_t left = t.blocks; left > 0; left -= t.group_blocks) {
    Wide::reg sum[kChains][kSums];
#pragma GCC unroll 4
    for (int c = 0; c < kChains; ++c)
#pragma GCC unroll 32
      for (int i = 0; i < kSums; ++i) sum[c][i] = Wide::zero();
    const int64_t blocks = left < t.group_blocks ? left : t.group_blocks;
    for (int64_t b = 0; b < blocks; ++b) {
      const Cells block(codes);
      codes += Cells::kBytes;
#pragma GCC unroll 8
      for (int step = 0; step < Cells::kSteps; ++step) {
        Wide::reg w[kQuantRegs];
        block.weights(step, w);
#pragma GCC unroll 16
        for (int m = 0; m < kRows; ++m) {
          const Wide::reg cell = Wide::bcast(x + 4 * m);
#pragma GCC unroll 2
          for (int i = 0; i < kQuantRegs; ++i) {
            Wide::reg& s = sum[step % kChains][m * kQuantRegs + i];
            s = Cells::dot(w[i], cell, s);
          }
        }
        x += 4 * kRows;
      }
    }
#pragma GCC unroll 32
    for (int i = 0; i < kSums; ++i) {
      Wide::reg s = sum[0][i];
#pragma GCC unroll 4
      for (int c = 1; c < kChains; ++c) s = Wide::add(s, sum[c][i]);
      const char* scale = scales + 2 * (i % kQuantRegs) * Wide::W;
      total[i] = Wide::fma(s, Wide::load_bf16(scale), total[i]);
    }
    scales += kQuantScaleBytes;
  }
#pragma GCC unroll 32
  for (int i = 0; i < kSums; ++i) Wide::store(t.sums + i * Wide::W, total[i]);
}

using QuantTileFn = void (*)(const QuantTile&);

struct QuantTileSize {
  int rows;
  QuantTileFn fn;
};

template <class C>
constexpr QuantTileSize kQuantTiles[] = {
    {1, quant_tile<C, 1>},   {2, quant_tile<C, 2>},   {3, quant_tile<C, 3>},
    {4, quant_tile<C, 4>},
#ifdef SPS_WIDE_REGISTERS
    {6, quant_tile<C, 6>},   {8, quant_tile<C, 8>},   {12, quant_tile<C, 12>},
    {16, quant_tile<C, 16>},
#endif
};

// The smallest tile of at least m rows, else the largest.
template <class C>
static QuantTileSize quant_tile_of(int64_t m) {
  QuantTileSize best{};
  for (const QuantTileSize& size : kQuantTiles<C>) {
    best = size;
    if (size.rows >= m) break;
  }
  return best;
}

// Where x comes in pairs of bfloat16. One row of int8 is as fast in floats: widening the codes
// costs more than the products.
static bool quant_pairs(const PackedLinearParams& p, int64_t m) {
#ifdef SPS_HAS_DPBF16
  return p.x_bf16 && (m > 1 || p.layout.kind == PackedKind::kInt4);
#else
  (void)p;
  (void)m;
  return false;
#endif
}

static QuantTileSize quant_tile_for(const PackedLinearParams& p, int64_t m) {
  const bool int8 = p.layout.kind == PackedKind::kInt8;
#ifdef SPS_HAS_DPBF16
  if (quant_pairs(p, m))
    return int8 ? quant_tile_of<Int8AsPairs>(m) : quant_tile_of<Int4AsPairs>(m);
#endif
  return int8 ? quant_tile_of<Int8AsF32>(m) : quant_tile_of<Int4AsF32>(m);
}

// Rows of x from m_begin that one tile takes; `cells` is left to the caller.
static QuantRows quant_rows(const PackedLinearParams& p, int64_t m_begin) {
  const int64_t left = p.m - m_begin, most = quant_tile_for(p, left).rows;
  const int64_t tiles = (left + most - 1) / most, m = (left + tiles - 1) / tiles;
  return {m_begin, static_cast<int>(m), quant_tile_for(p, m).rows, quant_pairs(p, m), nullptr};
}

static void quant_fill_rows(const PackedLinearParams& p, const QuantRows& rows) {
  const int64_t k = p.column_end - p.column_begin;
  const int64_t padded = (k + kQuantBlock - 1) / kQuantBlock * kQuantBlock;
  const int64_t step = 4 * rows.rows;
  __builtin_memset(rows.cells, 0, padded / (rows.pairs ? 2 : 1) * step);
  for (int r = 0; r < rows.m; ++r) {
    const char* x = p.x + (rows.m_begin + r) * p.x_stride;
    char* to = rows.cells + 4 * r;
    if (rows.pairs) {
      for (int64_t c = 0; c + 2 <= k; c += 2, to += step) __builtin_memcpy(to, x + 2 * c, 4);
      if (k % 2 == 1) __builtin_memcpy(to, x + 2 * (k - 1), 2);
      continue;
    }
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
  const int64_t columns = p.column_end - p.column_begin, first = p.column_begin / kQuantBlock;
  const int64_t panel_bytes = quant_panel_bytes(p.layout);
  const int64_t codes_bytes = quant_codes_bytes(p.layout);
  alignas(64) float sums[16 * kPanelOutputs];
  QuantTile t{};
  t.cells = rows.cells;
  t.blocks = (columns + kQuantBlock - 1) / kQuantBlock;
  t.group_blocks = p.layout.group / kQuantBlock;
  t.sums = sums;
  for (int64_t i = begin; i < end; ++i) {
    const char* panel = p.packed + (p.row_begin / kPanelOutputs + i) * panel_bytes;
    t.codes = panel + first * quant_block_bytes(p.layout.kind);
    t.scales = panel + codes_bytes + p.column_begin / p.layout.group * kQuantScaleBytes;
    tile.fn(t);
    for (int r = 0; r < rows.m; ++r)
      quant_store(p, rows.m_begin + r, i * kPanelOutputs, sums + r * kPanelOutputs);
  }
}

}  // namespace SPS_ISA_NS
}  // namespace sps
