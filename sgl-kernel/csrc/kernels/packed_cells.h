// What a tile over packed weights multiplies: a cell is 4 bytes of a row of x (a float, or two
// bfloat16) and the same 4 bytes of 16 outputs, 64 bytes of a panel.
#pragma once

#include "kernels/bf16.h"
#include "kernels/gemm_kernel.h"
#include "sps/packed.h"

namespace sps {
namespace SPS_ISA_NS {

constexpr int kPanelCellBytes = 64;
constexpr int kPanelRegs = 16 / Wide::W;  // registers that hold one number of each output

// kWeightRegs, kXRegs: registers that a loaded cell of a panel, and a broadcast cell of x, take. A
// tile has up to kRows rows of x and kPanels panels, or up to kFewRows rows and kFewPanels panels,
// or one row and kOneRowPanels (as few as keep up with memory).
struct CellF32 {
  static constexpr int kWeightRegs = kPanelRegs, kXRegs = 1;
  static constexpr PackedKind kKind = PackedKind::kF32;
#ifdef SPS_WIDE_REGISTERS
  static constexpr int kPanels = 2, kRows = 14, kFewPanels = 4, kFewRows = 7, kOneRowPanels = 1;
#else
  static constexpr int kPanels = 1, kRows = 6, kFewPanels = 1, kFewRows = 6, kOneRowPanels = 1;
#endif
  static void load(const char* panel, Wide::reg* w) {
    for (int i = 0; i < kPanelRegs; ++i) w[i] = Wide::load(panel + i * Wide::W * 4);
  }
  static void broadcast(const char* x, Wide::reg* r) { r[0] = Wide::bcast(x); }
  static void dot(const Wide::reg* w, const Wide::reg* x, Wide::reg* acc) {
    for (int i = 0; i < kPanelRegs; ++i) acc[i] = Wide::fma(w[i], x[0], acc[i]);
  }
};

// Pairs of bfloat16 as floats: the odd one is the upper half of its cell, the even one the lower.
struct CellBf16AsF32 {
  static constexpr int kWeightRegs = 2 * kPanelRegs, kXRegs = 2;
  static constexpr PackedKind kKind = PackedKind::kBf16;
#ifdef SPS_WIDE_REGISTERS
  static constexpr int kPanels = 2, kRows = 12, kFewPanels = 2, kFewRows = 12, kOneRowPanels = 2;
#else
  static constexpr int kPanels = 1, kRows = 4, kFewPanels = 1, kFewRows = 4, kOneRowPanels = 1;
#endif
  static void load(const char* panel, Wide::reg* w) {
    for (int i = 0; i < kPanelRegs; ++i) {
      const Wide::reg cells = Wide::load(panel + i * Wide::W * 4);
      w[i] = Wide::even_bf16(cells);
      w[kPanelRegs + i] = Wide::odd_bf16(cells);
    }
  }
  static void broadcast(const char* x, Wide::reg* r) {
    const Wide::reg cell = Wide::bcast(x);
    r[0] = Wide::even_bf16(cell);
    r[1] = Wide::odd_bf16(cell);
  }
  static void dot(const Wide::reg* w, const Wide::reg* x, Wide::reg* acc) {
    for (int i = 0; i < kPanelRegs; ++i) {
      acc[i] = Wide::fma(w[i], x[0], acc[i]);
      acc[i] = Wide::fma(w[kPanelRegs + i], x[1], acc[i]);
    }
  }
};

#ifdef SPS_HAS_DPBF16
struct CellBf16 {
  static constexpr int kWeightRegs = 1, kXRegs = 1;
  static constexpr PackedKind kKind = PackedKind::kBf16;
  static constexpr int kPanels = 2, kRows = 14, kFewPanels = 4, kFewRows = 7, kOneRowPanels = 1;
  static void load(const char* panel, Wide::reg* w) { w[0] = Wide::load(panel); }
  static void broadcast(const char* x, Wide::reg* r) { r[0] = Wide::bcast(x); }
  static void dot(const Wide::reg* w, const Wide::reg* x, Wide::reg* acc) {
    acc[0] = ModeBf16::dot<Wide>(w[0], x[0], acc[0]);
  }
};
using PackedCellBf16 = CellBf16;
#else
using PackedCellBf16 = CellBf16AsF32;
#endif

}  // namespace SPS_ISA_NS
}  // namespace sps
