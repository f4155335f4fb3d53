#include "sps/packed.h"

#include <algorithm>
#include <cstring>

#include "kernels/bf16.h"
#include "sps/cpu.h"
#include "sps/kernel_table.h"
#include "sps/quant.h"
#include "sps/thread_pool.h"

namespace sps {
namespace {

constexpr int64_t kCellBytes = 4;

int64_t cell_elements(PackedKind kind) { return kind == PackedKind::kBf16 ? 2 : 1; }

// One row as the packed kind stores it, padded to whole cells.
void row_cells(const PackParams& p, int64_t row, int64_t begin, int64_t cells, char* to) {
  const bool packed_bf16 = p.layout.kind == PackedKind::kBf16;
  const int64_t per_cell = cell_elements(p.layout.kind);
  const int64_t k0 = begin * per_cell, k1 = std::min(p.layout.k, (begin + cells) * per_cell);
  const char* from = p.weight + row * p.weight_stride;
  if (k1 < (begin + cells) * per_cell) std::memset(to + (cells - 1) * kCellBytes, 0, kCellBytes);
  if (packed_bf16 == p.weight_bf16) {
    const int64_t item = packed_bf16 ? 2 : 4;
    std::memcpy(to, from + k0 * item, static_cast<size_t>((k1 - k0) * item));
    return;
  }
  for (int64_t k = k0; k < k1; ++k) {
    if (packed_bf16) {
      float x;
      std::memcpy(&x, from + 4 * k, 4);
      const uint16_t h = float_to_bf16(x);
      std::memcpy(to + 2 * (k - k0), &h, 2);
    } else {
      uint16_t h;
      std::memcpy(&h, from + 2 * k, 2);
      const float x = bf16_to_float(h);
      std::memcpy(to + 4 * (k - k0), &x, 4);
    }
  }
}

constexpr int64_t kBlockCells = 64;

void pack_panel(const PackParams& p, int64_t panel) {
  const int64_t cells = panel_bytes(p.layout) / (kPanelOutputs * kCellBytes);
  const int64_t n0 = panel * kPanelOutputs;
  const int rows = static_cast<int>(std::min<int64_t>(kPanelOutputs, p.layout.n - n0));
  uint32_t block[kPanelOutputs][kBlockCells] = {};
  char* to = p.packed + panel * panel_bytes(p.layout);
  for (int64_t c = 0; c < cells; c += kBlockCells) {
    const int64_t count = std::min(kBlockCells, cells - c);
    for (int r = 0; r < rows; ++r)
      row_cells(p, n0 + r, c, count, reinterpret_cast<char*>(block[r]));
    for (int64_t i = 0; i < count; ++i) {
      uint32_t column[kPanelOutputs];
      for (int r = 0; r < kPanelOutputs; ++r) column[r] = block[r][i];
      std::memcpy(to + (c + i) * sizeof column, column, sizeof column);
    }
  }
}

void unpack_row(const PackParams& p, int64_t row) {
  const bool packed_bf16 = p.layout.kind == PackedKind::kBf16;
  const int64_t per_cell = cell_elements(p.layout.kind), item = packed_bf16 ? 2 : 4;
  const char* panel = p.packed + row / kPanelOutputs * panel_bytes(p.layout);
  char* to = p.weight + row * p.weight_stride;
  for (int64_t k = 0; k < p.layout.k; ++k) {
    const char* at = panel +
                     (k / per_cell * kPanelOutputs + row % kPanelOutputs) * kCellBytes +
                     k % per_cell * item;
    float x;
    uint16_t h;
    if (packed_bf16) {
      std::memcpy(&h, at, 2);
      x = bf16_to_float(h);
    } else {
      std::memcpy(&x, at, 4);
      h = float_to_bf16(x);
    }
    if (p.weight_bf16)
      std::memcpy(to + 2 * k, &h, 2);
    else
      std::memcpy(to + 4 * k, &x, 4);
  }
}

int64_t panels_of(int64_t n) { return (n + kPanelOutputs - 1) / kPanelOutputs; }

}  // namespace

int64_t panel_bytes(const PackedLayout& layout) {
  if (quantized(layout.kind)) return quant_panel_bytes(layout);
  const int64_t per_cell = cell_elements(layout.kind);
  return (layout.k + per_cell - 1) / per_cell * kPanelOutputs * kCellBytes;
}

int64_t packed_bytes(const PackedLayout& layout) {
  return panels_of(layout.n) * panel_bytes(layout);
}

void pack_weight(const PackParams& params, int threads) {
  if (quantized(params.layout.kind)) return quant_pack(params, threads);
  parallel_for(threads, panels_of(params.layout.n), [&](int64_t i) { pack_panel(params, i); });
}

void unpack_weight(const PackParams& params) {
  if (quantized(params.layout.kind)) return quant_unpack(params);
  for (int64_t row = 0; row < params.layout.n; ++row) unpack_row(params, row);
}

void packed_linear(const PackedLinearParams& params, int threads) {
  if (quantized(params.layout.kind)) return quant_linear(params, threads);
  const int64_t panels = panels_of(params.row_end - params.row_begin);
  if (params.m == 0 || panels == 0) return;
  const KernelTable& table = kernels();
  if (threads == 1) return table.packed_linear(params, PackedBlock{0, params.m, 0, panels});
  // Blocks of an even number of panels, a few per thread; of rows too where panels are too few.
  const int64_t parts = 4 * threads;
  const int64_t step = std::max<int64_t>(2, (panels + 2 * parts - 1) / (2 * parts) * 2);
  const int64_t columns = (panels + step - 1) / step;
  const int64_t m_parts = columns >= threads ? 1 : (parts + columns - 1) / columns;
  const int64_t m_step = std::max<int64_t>(16, (params.m + m_parts - 1) / m_parts);
  const int64_t rows = (params.m + m_step - 1) / m_step;
  parallel_for(threads, rows * columns, [&](int64_t i) {
    const int64_t m = i / columns * m_step, n = i % columns * step;
    table.packed_linear(params, PackedBlock{m, std::min(params.m, m + m_step), n,
                                            std::min(panels, n + step)});
  });
}

}  // namespace sps
