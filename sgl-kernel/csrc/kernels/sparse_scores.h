// Shares of pages: rows of a few query blocks against the sketches of all pages before them.
//
// Lanes are rows. A chunk is up to kChunkPages pages whose index is a multiple of the chunk's size.
// Within it channel c of a key is low + code * step, and code * step is taken as an integer (up to
// 3 * kLargestStep) times the chunk's largest step / kLargestStep, so that rows times that step are
// rounded to signed bytes once a chunk, not once a page. Which chunks a block sees depends on the
// number of pages before it alone, so its shares do not depend on the blocks beside it.
#pragma once

#include <cmath>

#include "kernels/attention_micro.h"
#include "kernels/sparse_bytes.h"
#include "sps/scratch.h"
#include "sps/sparse.h"

namespace sps {
namespace SPS_ISA_NS {

constexpr int kChunkPages = 16;
constexpr int64_t kChunkBytes = 131072;  // of codes, which stay in the second-level cache
constexpr float kLog2e = 1.44269504f;

static inline int pages_before(const QueryBlock& b, int page) { return b.position / page; }

// Pages of a whole chunk, a power of 2.
static inline int chunk_pages(int page, int d) {
  int pages = kChunkPages;
  while (pages > 1 && int64_t{pages} * page * d > kChunkBytes) pages /= 2;
  return pages;
}

// Row of a block of `count` that is the i-th of `rows` scored ones.
static inline int scored_row(int count, int rows, int i) {
  return static_cast<int>(int64_t{i + 1} * count / rows) - 1;
}

template <class E>
static void load_floats(const char* src, int d, float* dst) {
  if (E::kElemBytes == 4)
    std::memcpy(dst, src, static_cast<size_t>(d) * 4);
  else
    convert_bf16_row(src, dst, d);
}

// Registers of rows [first, last) of a unit.
struct RowSpan {
  int first, last;
};

// Rows lie in groups of kRowRegs registers, cell by cell: q [groups, steps, kRowBlock].
template <class M>
struct ShareState {
  int steps, cells, pages;  // cells of a row; of four bytes; most pages before a block
  int regs, chunk;          // registers of rows; pages of a whole chunk
  RowSpan span[kShareBlocks];
  float* q;
  int32_t *lo, *hi;      // [regs, W]
  float *own, *ref;      // [regs, W]: log2 of the own block's mass; what masses are relative to
  float* inverse;        // [regs, W]: 1 / the mass of all
  float* mass;           // [pages, regs, W]
  int32_t* rounded;      // [cells, kRowBlock]
  float* low;            // [kChunkPages, steps] cells
  float* lows;           // [kChunkPages, kRowBlock]: q.low
  float* steps_of;       // [kChunkPages, d]
  float* step;           // [d]: the chunk's largest
  uint8_t* codes;        // [kChunkPages, page, d]
  float* keys;           // [kTile, steps] cells

  ShareState(const ShareParams& p, const ShareUnit& u) {
    const int64_t d = p.layout.d;
    steps = p.layout.d / M::kPerCell;
    cells = p.layout.d / 4;
    pages = pages_before(u.blocks[u.count - 1], p.layout.page);
    chunk = chunk_pages(p.layout.page, p.layout.d);
    regs = 0;
    for (int b = 0; b < u.count; ++b) {
      span[b].first = regs;
      regs += (p.group * u.rows[b] + Wide::W - 1) / Wide::W;
      span[b].last = regs;
    }
    const int64_t padded = (regs + kRowRegs - 1) / kRowRegs * kRowBlock;
    const int64_t lanes = int64_t{regs} * Wide::W;
    const int64_t floats = padded * steps + (5 + pages) * lanes + cells * kRowBlock +
                           kChunkPages * (steps + kRowBlock + d) + d + int64_t{kTile} * steps;
    Pieces at(thread_scratch(floats * 4 + chunk * p.layout.page * d + 18 * 64));
    q = at.take<float>(padded * steps);
    lo = at.take<int32_t>(lanes);
    hi = at.take<int32_t>(lanes);
    own = at.take<float>(lanes);
    inverse = at.take<float>(lanes);
    ref = at.take<float>(lanes);
    mass = at.take<float>(pages * lanes);
    rounded = at.take<int32_t>(cells * kRowBlock);
    low = at.take<float>(kChunkPages * steps);
    lows = at.take<float>(kChunkPages * kRowBlock);
    steps_of = at.take<float>(kChunkPages * d);
    step = at.take<float>(d);
    codes = at.take<uint8_t>(chunk * p.layout.page * d);
    keys = at.take<float>(int64_t{kTile} * steps);
  }

  // A register's cell 0.
  float* row(int reg) const {
    return q + int64_t{reg / kRowRegs} * steps * kRowBlock + reg % kRowRegs * Wide::W;
  }
};

// Row `at` of a block and head into a lane of a register.
template <class M>
static void load_row(const ShareParams& p, const QueryBlock& b, int64_t head, int at, int reg,
                     int lane, ShareState<M>& st) {
  float converted[kMaxHeadDim];
  const char* src = p.q + int64_t{b.row + at} * p.q_token_stride + head * p.q_head_stride;
  if (M::kConvert) {
    M::convert_row(src, converted, p.layout.d);
    src = reinterpret_cast<const char*>(converted);
  }
  float* dst = st.row(reg) + lane;
  for (int c = 0; c < st.steps; ++c)
    __builtin_memcpy(dst + int64_t{c} * kRowBlock, src + 4 * c, 4);
  st.lo[reg * Wide::W + lane] = 0;
  st.hi[reg * Wide::W + lane] = b.position + at;
}

// Heads follow one another in the lanes of a block; those beyond the last row repeat it.
template <class M>
static void load_rows(const ShareParams& p, const ShareUnit& u, ShareState<M>& st) {
  for (int b = 0; b < u.count; ++b) {
    const int rows = u.rows[b], last = p.group * rows - 1;
    for (int i = 0; i < (st.span[b].last - st.span[b].first) * Wide::W; ++i) {
      const int lane = i < last ? i : last;
      load_row<M>(p, u.blocks[b], int64_t{u.kv_head} * p.group + lane / rows,
                  scored_row(u.blocks[b].count, rows, lane % rows), st.span[b].first + i / Wide::W,
                  i % Wide::W, st);
    }
  }
}

// A tile of the block's own keys, as cells.
template <class M>
static Tile own_tile(const ShareParams& p, const QueryBlock& b, int kv_head, int offset,
                     float* buf) {
  const int page = p.layout.page, at = pages_before(b, page) + offset / page;
  const int64_t id = p.page_ids[b.list_begin + at], pool = id / p.summaries.slots_per_pool;
  const int64_t slot = id - pool * p.summaries.slots_per_pool;
  const char* k = p.k_pools[pool] + slot * p.k_layout.slot_stride +
                  kv_head * p.k_layout.head_stride + offset % page * p.k_layout.token_stride;
  Tile t{k, k, static_cast<int32_t>(p.k_layout.token_stride), 0, b.position + offset};
  if (M::kConvert) convert_keys<M>(t, p.layout.d, buf);
  return t;
}

// log2 of the mass that each row finds among the keys of its own block up to itself.
template <class M>
static void own_mass(const ShareParams& p, const QueryBlock& b, int kv_head, RowSpan span,
                     ShareState<M>& st) {
  constexpr int kKeys = keys_per_micro(1);
  alignas(64) float s[kTile * kRowBlock], mx[Wide::W], l[Wide::W], alpha[Wide::W];
  for (int reg = span.first; reg < span.last; ++reg) {
    float* m = st.own + reg * Wide::W;
    const RowBounds bounds{st.lo + reg * Wide::W, st.hi + reg * Wide::W};
    for (int i = 0; i < Wide::W; ++i) {
      m[i] = -INFINITY;
      l[i] = 0.0f;
    }
    for (int offset = 0; offset < b.count; offset += kTile) {
      const Tile t = own_tile<M>(p, b, kv_head, offset, st.keys);
      for (int i = 0; i < Wide::W; ++i) mx[i] = -INFINITY;
      for (int i = 0; i < kTile; i += kKeys)
        scores_micro<M, Wide, 1, kKeys>(st.row(reg), kRowBlock, t.k + int64_t{i} * t.k_stride,
                                        t.k_stride, st.steps, t.pos + i, &bounds,
                                        s + i * kRowBlock, mx);
      softmax_step<ModeF32, Wide, 1>(s, kRowBlock, kTile, p.scale * kLog2e, mx, m, l, alpha);
    }
    for (int i = 0; i < Wide::W; ++i) {
      m[i] += ::log2f(l[i]);
      st.ref[reg * Wide::W + i] = m[i];
    }
  }
}

}  // namespace SPS_ISA_NS
}  // namespace sps
