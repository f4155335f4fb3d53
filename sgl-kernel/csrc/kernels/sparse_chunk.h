// One chunk of pages against registers of rows; see sparse_scores.h.
#pragma once

#include "kernels/sparse_exp.h"
#include "kernels/sparse_scores.h"

namespace sps {
namespace SPS_ISA_NS {

// Sums 2^(base + factor * (row . key)) over a page's keys, or takes the largest exponent. base and
// factor are in PowerSum's terms.
template <int NV, bool kLargest>
static void page_mass(const int32_t* rows, const uint8_t* codes, int keys, int cells,
                      const float* factor, const float* base, float* mass) {
  constexpr int KT = keys_per_micro(NV);
  const int64_t d = int64_t{cells} * 4;
  Wide::reg found[NV];
#pragma GCC unroll 4
  for (int v = 0; v < NV; ++v) found[v] = Wide::set1(kLargest ? -INFINITY : 0.0f);
  for (int key = 0; key < keys; key += KT, codes += KT * d) {
    Bytes::reg acc[KT][NV];
#pragma GCC unroll 16
    for (int i = 0; i < KT; ++i)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) acc[i][v] = Bytes::zero();
    for (int c = 0; c < cells; ++c) {
      Bytes::reg row[NV];
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) row[v] = Bytes::load(rows + c * kRowBlock + v * Wide::W);
#pragma GCC unroll 16
      for (int i = 0; i < KT; ++i) {
        const Bytes::reg key_cell = Bytes::bcast(codes + i * d + 4 * c);
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) acc[i][v] = Bytes::dot(key_cell, row[v], acc[i][v]);
      }
    }
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      const Wide::reg f = Wide::load(factor + v * Wide::W), b = Wide::load(base + v * Wide::W);
#pragma GCC unroll 8
      for (int i = 0; i < KT; i += 2) {
        const Wide::reg x = Wide::fma(Bytes::to_float(acc[i][v]), f, b);
        const Wide::reg y = Wide::fma(Bytes::to_float(acc[i + 1][v]), f, b);
        found[v] = kLargest ? Wide::max(found[v], Wide::max(x, y)) : PowerSum::add(found[v], x, y);
      }
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < NV; ++v) Wide::store(mass + v * Wide::W, found[v]);
}

// Makes pages [first, first + count) of a block's sequence ready: their lows as cells, their codes
// times their steps as bytes, and the largest step of each channel.
template <class M>
static void prepare_chunk(const ShareParams& p, const ShareUnit& u, int first, int count,
                          ShareState<M>& st) {
  const SummaryLayout& t = p.layout;
  const char* summary[kChunkPages];
  for (int c = 0; c < t.d; ++c) st.step[c] = 0.0f;
  for (int j = 0; j < count; ++j) {
    const int64_t id = p.page_ids[u.blocks[0].list_begin + first + j];
    const int64_t pool = id / p.summaries.slots_per_pool;
    summary[j] = p.summaries.pools[pool] +
                 (id - pool * p.summaries.slots_per_pool) * p.summaries.slot_stride +
                 u.kv_head * p.summaries.head_stride;
    float* low = st.low + int64_t{j} * st.steps;
    if (M::kConvert)
      M::convert_row(summary[j] + t.low, low, t.d);
    else
      std::memcpy(low, summary[j] + t.low, static_cast<size_t>(st.steps) * 4);
    float* steps = st.steps_of + int64_t{j} * t.d;
    load_floats<M>(summary[j] + t.step, t.d, steps);
    for (int c = 0; c < t.d; ++c) st.step[c] = steps[c] > st.step[c] ? steps[c] : st.step[c];
  }
  for (int j = 0; j < count; ++j)
    expand_codes(summary[j] + t.codes, t.page, t.d,
                 Multipliers(st.steps_of + int64_t{j} * t.d, st.step, t.d),
                 st.codes + int64_t{j} * t.page * t.d);
}

// Channel c of a register's rows.
template <class M>
static inline Wide::reg channel(const float* row, int c) {
  const Wide::reg cell = Wide::load(row + int64_t{c / M::kPerCell} * kRowBlock);
  if (M::kPerCell == 1) return cell;
  return c % 2 == 0 ? Wide::even_bf16(cell) : Wide::odd_bf16(cell);
}

// Rounds a register's rows times the chunk's steps to signed bytes; worth: what a product of bytes
// stands for, times `unit`, of each row.
template <class M>
static void round_rows(ShareState<M>& st, int reg, float unit, float* worth) {
  const float* row = st.row(reg);
  Wide::reg most = Wide::set1(1e-30f);
  for (int c = 0; c < 4 * st.cells; ++c) {
    const Wide::reg x = Wide::mul(channel<M>(row, c), Wide::set1(st.step[c]));
    most = Wide::max(most, Wide::max(x, Wide::sub(Wide::zero(), x)));
  }
  const Wide::reg scale = Wide::div(Wide::set1(127.0f), most);
  int32_t* out = st.rounded + reg % kRowRegs * Wide::W;
  for (int i = 0; i < st.cells; ++i) {
    Wide::reg x[4];
    for (int j = 0; j < 4; ++j) {
      const int c = 4 * i + j;
      x[j] = Wide::mul(Wide::mul(channel<M>(row, c), Wide::set1(st.step[c])), scale);
    }
    Bytes::store_rounded(x, out + i * kRowBlock);
  }
  Wide::store(worth, Wide::mul(most, Wide::set1(unit / (127.0f * kLargestStep))));
}

// Registers [reg, reg + NV), which lie in one group, against the prepared pages.
template <class M, int NV, bool kLargest>
static void score_group(const ShareParams& p, ShareState<M>& st, int reg, int first, int count) {
  constexpr int kKeys = keys_per_micro(NV);
  const float to_log2 = p.scale * kLog2e * PowerSum::kScale;
  alignas(64) float factor[kRowBlock], base[kRowBlock], mx[kRowBlock];
  for (int v = 0; v < NV; ++v) round_rows<M>(st, reg + v, to_log2, factor + v * Wide::W);
  for (int i = 0; i < kRowBlock; ++i) mx[i] = 0.0f;
  const int at = reg % kRowRegs * Wide::W;
  for (int j = 0; j < count; j += kKeys)
    scores_micro<M, Wide, NV, kKeys>(
        st.row(reg), kRowBlock, reinterpret_cast<const char*>(st.low + int64_t{j} * st.steps),
        int64_t{st.steps} * 4, st.steps, 0, nullptr, st.lows + j * kRowBlock, mx);
  const float* ref = st.ref + reg * Wide::W;
  for (int j = 0; j < count; ++j) {
    const float* low = st.lows + j * kRowBlock;
    for (int i = 0; i < NV * Wide::W; ++i)
      base[i] = low[i] * to_log2 + (PowerSum::kBias - ref[i] * PowerSum::kScale);
    page_mass<NV, kLargest>(st.rounded + at,
                            st.codes + int64_t{j} * p.layout.page * p.layout.d, p.layout.page,
                            st.cells, factor, base,
                            st.mass + (int64_t{first + j} * st.regs + reg) * Wide::W);
  }
}

// Registers of `span` against pages [first, first + count), group by group.
template <class M, bool kLargest>
static void score_chunk(const ShareParams& p, ShareState<M>& st, RowSpan span, int first,
                        int count) {
  for (int reg = span.first; reg < span.last;) {
    const int in_group = kRowRegs - reg % kRowRegs, left = span.last - reg;
    const int n = left < in_group ? left : in_group;
    switch (n) {
      case 1: score_group<M, 1, kLargest>(p, st, reg, first, count); break;
      case 2: score_group<M, 2, kLargest>(p, st, reg, first, count); break;
#ifdef SPS_WIDE_REGISTERS
      case 3: score_group<M, 3, kLargest>(p, st, reg, first, count); break;
      default: score_group<M, 4, kLargest>(p, st, reg, first, count); break;
#endif
    }
    reg += n;
  }
}

// All pages before each block: whole chunks for all blocks that have them, then each block's rest in
// chunks of powers of 2.
template <class M, bool kLargest>
static void score_pages(const ShareParams& p, const ShareUnit& u, ShareState<M>& st) {
  const int page = p.layout.page, whole = st.pages / st.chunk;
  for (int c = 0; c < whole; ++c) {
    int b = 0;  // first block that has this chunk: blocks stand in order of position
    while (pages_before(u.blocks[b], page) / st.chunk <= c) ++b;
    prepare_chunk<M>(p, u, c * st.chunk, st.chunk, st);
    score_chunk<M, kLargest>(p, st, {st.span[b].first, st.regs}, c * st.chunk, st.chunk);
  }
  for (int b = 0; b < u.count; ++b) {
    const int before = pages_before(u.blocks[b], page);
    int at = before / st.chunk * st.chunk;
    for (int size = st.chunk / 2; size > 0; size /= 2) {
      if ((before & size) == 0) continue;
      prepare_chunk<M>(p, u, at, size, st);
      score_chunk<M, kLargest>(p, st, st.span[b], at, size);
      at += size;
    }
  }
}

}  // namespace SPS_ISA_NS
}  // namespace sps
