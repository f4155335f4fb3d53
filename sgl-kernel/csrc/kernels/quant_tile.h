// Products of a few rows of x with quantized panels: each block is decoded once, in registers, for
// up to 16 rows. Codes are summed within a group, and the group's sum is scaled in float32.
#pragma once

#include "kernels/quant_cells.h"

namespace sps {
namespace SPS_ISA_NS {

// `add`: go on from what sums hold.
struct QuantTile {
  const PackedLayout* layout;
  const char *panel, *cells;
  int64_t first_group, blocks;
  float* sums;  // [rows][16]
  bool add;
};

// Independent sums of each number, so that additions need not wait for one another.
constexpr int quant_chains(int sums) { return sums <= 4 ? 4 : sums <= 8 ? 2 : 1; }

// Returns where the cells of x that come next begin.
template <class Cells, int kRows>
static const char* quant_tile(const QuantTile& t) {
  constexpr int kChains = quant_chains(kRows * kQuantRegs), kSums = kRows * kQuantRegs;
  Wide::reg total[kSums], sum[kChains * kSums];
#pragma GCC unroll 32
  for (int i = 0; i < kSums; ++i)
    total[i] = t.add ? Wide::load(t.sums + i * Wide::W) : Wide::zero();
  const char* x = t.cells;
  const int64_t group_blocks = t.layout->group / kQuantBlock;
  int64_t group = t.first_group;
  for (int64_t left = t.blocks; left > 0; left -= group_blocks, ++group) {
    const char* codes = t.panel + quant_codes_at(*t.layout, group);
    const char* const scales = t.panel + quant_scales_at(*t.layout, group);
#pragma GCC unroll 32
    for (int i = 0; i < kChains * kSums; ++i) sum[i] = Wide::zero();
    const int64_t blocks = left < group_blocks ? left : group_blocks;
    for (int64_t b = 0; b < blocks; ++b, codes += Cells::kBytes) {
      const Cells block(codes);
#pragma GCC unroll 8
      for (int step = 0; step < kQuantBlock; ++step, x += 4 * kRows) {
        Wide::reg w[kQuantRegs];
        block.weights(step, w);
#pragma GCC unroll 16
        for (int m = 0; m < kRows; ++m) {
          const Wide::reg cell = Wide::bcast(x + 4 * m);
#pragma GCC unroll 2
          for (int i = 0; i < kQuantRegs; ++i) {
            Wide::reg& s = sum[step % kChains * kSums + m * kQuantRegs + i];
            s = Wide::fma(w[i], cell, s);
          }
        }
      }
    }
#pragma GCC unroll 32
    for (int i = 0; i < kSums; ++i) {
      Wide::reg s = sum[i];
#pragma GCC unroll 4
      for (int c = 1; c < kChains; ++c) s = Wide::add(s, sum[c * kSums + i]);
      const char* scale = scales + 2 * (i % kQuantRegs) * Wide::W;
      total[i] = Wide::fma(s, Wide::load_bf16(scale), total[i]);
    }
  }
#pragma GCC unroll 32
  for (int i = 0; i < kSums; ++i) Wide::store(t.sums + i * Wide::W, total[i]);
  return x;
}

}  // namespace SPS_ISA_NS
}  // namespace sps
