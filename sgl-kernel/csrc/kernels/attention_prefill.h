// Attention of many query rows: blocks of rows x chunks of tiles, online softmax.
#pragma once

#include <cmath>

#include "kernels/attention_micro.h"
#include "kernels/attention_output.h"
#include "sps/scratch.h"

namespace sps {
namespace SPS_ISA_NS {

constexpr int kStepTiles = 4;  // tiles of one online-softmax step
constexpr int kMaxChunkTiles = 32;

// Tiles prepared at a time, so that their keys and values stay in the second-level cache.
template <class M>
static int chunk_tiles(int d) {
  const int fit = 65536 / (kTile * d * 4 / M::kPerCell);
  return fit < 4 ? 4 : fit > kMaxChunkTiles ? kMaxChunkTiles : fit;
}

template <class M>
static int max_unit_rows(int d) {
  const int fit = 262144 / (d * (4 / M::kPerCell + 4)) / kRowBlock * kRowBlock;
  return fit < kRowBlock ? kRowBlock : fit;
}

template <class M>
struct PrefillState {
  int blocks, steps;  // row blocks; cells of a head
  float* q;           // [blocks, steps, kRowBlock] cells
  float* o;           // [blocks, d, kRowBlock]
  float *m, *l;       // [blocks, kRowBlock]
  int32_t *lo, *hi;   // [blocks, kRowBlock]
  float* s;           // [kStepTiles * kTile, kRowBlock]
  float* rows;        // [kRowBlock, d]
  float *k_buf, *v_buf;  // [chunk, kTile, d] cells
  char* decoded;         // [chunk] tiles of decoded_bytes

  PrefillState(const AttentionParams& p, const AttentionUnit& u) {
    blocks = (u.row_count + kRowBlock - 1) / kRowBlock;
    steps = p.d / M::kPerCell;
    const size_t padded = static_cast<size_t>(blocks) * kRowBlock, d = p.d;
    const size_t tile_cells = chunk_tiles<M>(p.d) * static_cast<size_t>(kTile) * d / M::kPerCell;
    const size_t k_cells = M::kConvert ? tile_cells : 0;
    const size_t decoded_size = chunk_tiles<M>(p.d) * decoded_bytes<M>(p);
    const size_t floats = padded * (steps + d + 4) + kStepTiles * kTile * kRowBlock +
                          kRowBlock * d + k_cells + tile_cells;
    Pieces pieces(thread_scratch(floats * 4 + decoded_size + 11 * 64));
    q = pieces.take<float>(padded * steps);
    o = pieces.take<float>(padded * d);
    m = pieces.take<float>(padded);
    l = pieces.take<float>(padded);
    lo = pieces.take<int32_t>(padded);
    hi = pieces.take<int32_t>(padded);
    s = pieces.take<float>(kStepTiles * kTile * kRowBlock);
    rows = pieces.take<float>(kRowBlock * d);
    k_buf = pieces.take<float>(k_cells);
    v_buf = pieces.take<float>(tile_cells);
    decoded = pieces.take<char>(decoded_size);
  }
};

// Rows beyond the last one repeat it: finite work that nobody reads.
template <class M>
static void load_queries(const AttentionParams& p, const AttentionUnit& u, PrefillState<M>& st,
                         int row_block, int64_t padded) {
  float converted[kMaxHeadDim];
  for (int64_t i = 0; i < padded; ++i) {
    const int row = u.row_begin + static_cast<int>(i < u.row_count ? i : u.row_count - 1);
    const int64_t head = static_cast<int64_t>(u.kv_head) * p.group + row % p.group;
    const char* src = p.q + (u.q_begin + row / p.group) * p.q_token_stride +
                      head * p.q_head_stride;
    if (M::kConvert) {
      M::convert_row(src, converted, p.d);
      src = reinterpret_cast<const char*>(converted);
    }
    float* dst = st.q + i / row_block * row_block * st.steps + i % row_block;
    for (int c = 0; c < st.steps; ++c)
      __builtin_memcpy(dst + static_cast<int64_t>(c) * row_block, src + 4 * c, 4);
    const Reach reach = row_reach(p, u, row);
    st.lo[i] = reach.lo;
    st.hi[i] = reach.hi;
    st.m[i] = -INFINITY;
    st.l[i] = 0.0f;
  }
}

// Makes the tiles of a chunk ready to be multiplied by every row block.
template <class M>
static void prepare_tile(Tile& t, Reach reach, int d, float* k_buf, float* v_buf) {
  if (M::kConvert) convert_keys<M>(t, d, k_buf);
  if (M::kConvert || !within(t, reach)) copy_values<M>(t, reach, d, reinterpret_cast<char*>(v_buf));
}

#ifdef SPS_HAS_DPBF16
template <>
void prepare_tile<ModeBf16>(Tile& t, Reach reach, int d, float*, float* v_buf) {
  for (int j = 0; j < kTile / 2; ++j)
    pack_value_pair(value_row(t, reach, 2 * j), value_row(t, reach, 2 * j + 1), v_buf + j * d, d);
  t.v = reinterpret_cast<const char*>(v_buf);
  t.v_stride = d * 4;
}
#endif

// One online-softmax step of one row block over n (at most kStepTiles) tiles.
template <class M, int NV>
static void block_step(const AttentionParams& p, PrefillState<M>& st, int block,
                       const Tile* const* tiles, int n, Reach full) {
  constexpr int kKeys = keys_per_micro(NV);
  const int64_t at = static_cast<int64_t>(block) * kRowBlock;
  alignas(64) float mx[kRowBlock], alpha[kRowBlock];
  for (int i = 0; i < NV * Wide::W; ++i) mx[i] = -INFINITY;
  const RowBounds bounds{st.lo + at, st.hi + at};
  for (int t = 0; t < n; ++t) {
    const Tile& tile = *tiles[t];
    const RowBounds* masked = within(tile, full) ? nullptr : &bounds;
    for (int i = 0; i < kTile; i += kKeys)
      scores_micro<M, Wide, NV, kKeys>(st.q + at * st.steps, kRowBlock,
                                       tile.k + static_cast<int64_t>(i) * tile.k_stride,
                                       tile.k_stride, st.steps, tile.pos + i, masked,
                                       st.s + (t * kTile + i) * kRowBlock, mx);
  }
  softmax_step<M, Wide, NV>(st.s, kRowBlock, n * kTile, p.scale * 1.44269504f, mx, st.m + at,
                            st.l + at, alpha);
  constexpr int kCols = kKeys < 8 ? kKeys : 8;
  for (int c = 0; c < p.d; c += kCols)
    values_micro<M, Wide, NV, kCols>(st.s, kRowBlock, tiles, n, c, alpha, st.o + at * p.d);
}

// One row block over the prepared tiles of a chunk: leaves out tiles that no row reaches.
template <class M, int NV>
static void block_chunk(const AttentionParams& p, const AttentionUnit& u, PrefillState<M>& st,
                        int block, const Tile* tiles, int n) {
  const int first = block * kRowBlock;
  const int last = first + NV * Wide::W < u.row_count ? first + NV * Wide::W : u.row_count;
  const Reach any{st.lo[first], st.hi[last - 1]};   // reached by some row
  const Reach full{st.lo[last - 1], st.hi[first]};  // reached by all
  const Tile* step[kStepTiles];
  int count = 0;
  for (int t = 0; t < n; ++t) {
    if (tiles[t].pos > any.hi || tiles[t].pos + kTile <= any.lo) continue;
    step[count++] = &tiles[t];
    if (count < kStepTiles) continue;
    block_step<M, NV>(p, st, block, step, count, full);
    count = 0;
  }
  if (count > 0) block_step<M, NV>(p, st, block, step, count, full);
}

template <class M>
static void block_dispatch(const AttentionParams& p, const AttentionUnit& u, PrefillState<M>& st,
                           int block, const Tile* tiles, int n) {
  const int rows = u.row_count - block * kRowBlock;
  const int regs = rows >= kRowBlock ? kRowRegs : (rows + Wide::W - 1) / Wide::W;
  switch (regs) {
    case 1: return block_chunk<M, 1>(p, u, st, block, tiles, n);
    case 2: return block_chunk<M, 2>(p, u, st, block, tiles, n);
#ifdef SPS_WIDE_REGISTERS
    case 3: return block_chunk<M, 3>(p, u, st, block, tiles, n);
    default: return block_chunk<M, 4>(p, u, st, block, tiles, n);
#else
    default: return;
#endif
  }
}

template <class M>
static void finish_blocks(const AttentionParams& p, const AttentionUnit& u, PrefillState<M>& st) {
  for (int block = 0; block < st.blocks; ++block) {
    const int64_t at = static_cast<int64_t>(block) * kRowBlock;
    const int rows = u.row_count - at < kRowBlock ? u.row_count - static_cast<int>(at) : kRowBlock;
    for (int c = 0; c < p.d; c += 8)
      for (int r = 0; r < rows; r += 8)
        transpose8x8(st.o + at * p.d + static_cast<int64_t>(c) * kRowBlock + r, kRowBlock,
                     st.rows + static_cast<int64_t>(r) * p.d + c, p.d);
    for (int r = 0; r < rows; ++r)
      finish_row(p, u, static_cast<int>(at) + r, st.rows + static_cast<int64_t>(r) * p.d,
                 st.m[at + r], st.l[at + r]);
  }
}

template <class M>
static void prefill_unit(const AttentionParams& p, const AttentionUnit& u) {
  PrefillState<M> st(p, u);
  const int64_t padded = static_cast<int64_t>(st.blocks) * kRowBlock;
  load_queries(p, u, st, kRowBlock, padded);
  std::memset(st.o, 0, padded * p.d * sizeof(float));
  const Reach reach = rows_reach(p, u, u.row_begin, u.row_begin + u.row_count - 1);
  TileWalk walk(p, u, reach);
  Tile tiles[kMaxChunkTiles];
  const int chunk = chunk_tiles<M>(p.d);
  const int64_t tile_cells = static_cast<int64_t>(kTile) * p.d / M::kPerCell;
  while (const int n = walk.next(tiles, chunk)) {
    for (int t = 0; t < n; ++t) {
      decode_tile<M>(p, tiles[t], tiles[t + 1 < n ? t + 1 : t],
                     st.decoded + t * decoded_bytes<M>(p));
      prepare_tile<M>(tiles[t], reach, p.d, st.k_buf + t * tile_cells, st.v_buf + t * tile_cells);
    }
    for (int block = 0; block < st.blocks; ++block) block_dispatch(p, u, st, block, tiles, n);
  }
  finish_blocks(p, u, st);
}

}  // namespace SPS_ISA_NS
}  // namespace sps
