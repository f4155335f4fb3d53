// Attention of at most 8 query rows: memory-bound, so keys and values are read once, in place.
#pragma once

#include "kernels/attention_micro.h"
#include "kernels/attention_output.h"
#include "kernels/attention_prefill.h"

namespace sps {
namespace SPS_ISA_NS {

constexpr int kDecodeRows = Narrow::W;
static_assert(kDecodeRows == kFewRows);
constexpr int kDecodeTiles = 4;  // tiles of one online-softmax step
#ifdef SPS_WIDE_REGISTERS
constexpr int kDecodeKeys = 16;
#else
constexpr int kDecodeKeys = 8;
#endif

// Pages lie anywhere, and rows of a page are read side by side: the hardware's prefetchers do not
// follow. So the next step's keys are asked for while this one's are multiplied, and its values
// with this one's values: into the second-level cache, which has the more misses in flight, and a
// line at a time, for bursts stall. A tile has as many lines as scores_micro has steps. Rows that
// do not lie one behind the other are asked for at wrong addresses: harmless, and slower.
// Where memory lies in small pages, the first of these prefetches waits for a page walk, and those
// behind it for a place in its queue: so each tile is touched once, a step before its burst.
// The tiles of one step, and those of the next.
struct DecodeTiles {
  Tile tile[kDecodeTiles];
  int n = 0;
};

// Adds the weighted values of n tiles to NR registers of columns of R output rows (o [R, d]).
template <class M, class V, int NR, int R>
static inline void decode_values(const float* p, const DecodeTiles& tiles,
                                 const DecodeTiles& next, int col, int d, const float* alpha,
                                 float* o) {
  typename V::reg acc[R][NR];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int i = 0; i < NR; ++i)
      acc[r][i] = V::mul(V::load(o + r * d + col + i * V::W), V::set1(alpha[r]));
  constexpr int kBytes = M::kConvert ? 4 : M::kElemBytes;
  // Lines of a tile that each step of each group of columns asks for.
  constexpr int kLines = kTile * NR * V::W * M::kElemBytes / 64 / (kTile / M::kPerCell);
  for (int t = 0; t < tiles.n; ++t) {
    const char* row = tiles.tile[t].v + static_cast<int64_t>(col) * kBytes;
    const int64_t stride = tiles.tile[t].v_stride;
    const Tile& soon = t < next.n ? next.tile[t] : tiles.tile[t];
    const char* ahead = soon.v + static_cast<int64_t>(col) * kTile * M::kElemBytes;
    for (int step = 0; step < kTile / M::kPerCell; ++step) {
      typename V::reg vals[NR];
      M::template load_values<V, NR>(row, stride, vals);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const typename V::reg b = V::bcast(p + r);
#pragma GCC unroll 2
        for (int i = 0; i < NR; ++i) acc[r][i] = M::template dot<V>(vals[i], b, acc[r][i]);
      }
#pragma GCC unroll 4
      for (int i = 0; i < kLines; ++i) __builtin_prefetch(ahead + 64 * i, 0, 2);
      ahead += 64 * kLines;
      row += stride * M::kPerCell;
      p += kDecodeRows;
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int i = 0; i < NR; ++i) V::store(o + r * d + col + i * V::W, acc[r][i]);
}

template <class M, int R>
static void decode_values_all(const float* p, const DecodeTiles& tiles, const DecodeTiles& next,
                              int d, const float* alpha, float* o) {
  int c = 0;
#ifdef SPS_WIDE_REGISTERS
  for (; c + 2 * Wide::W <= d; c += 2 * Wide::W)
    decode_values<M, Wide, 2, R>(p, tiles, next, c, d, alpha, o);
#endif
  for (; c < d; c += Narrow::W) decode_values<M, Narrow, 1, R>(p, tiles, next, c, d, alpha, o);
}

template <class M>
static void decode_values_rows(int rows, const float* p, const DecodeTiles& tiles,
                               const DecodeTiles& next, int d, const float* alpha, float* o) {
  switch (rows) {
    case 1: return decode_values_all<M, 1>(p, tiles, next, d, alpha, o);
    case 2: return decode_values_all<M, 2>(p, tiles, next, d, alpha, o);
    case 3: return decode_values_all<M, 3>(p, tiles, next, d, alpha, o);
    case 4: return decode_values_all<M, 4>(p, tiles, next, d, alpha, o);
    case 5: return decode_values_all<M, 5>(p, tiles, next, d, alpha, o);
    case 6: return decode_values_all<M, 6>(p, tiles, next, d, alpha, o);
    case 7: return decode_values_all<M, 7>(p, tiles, next, d, alpha, o);
    default: return decode_values_all<M, 8>(p, tiles, next, d, alpha, o);
  }
}

static inline void touch(const DecodeTiles& tiles) {
  for (int t = 0; t < tiles.n; ++t) {
    __builtin_prefetch(tiles.tile[t].k, 0, 2);
    __builtin_prefetch(tiles.tile[t].v, 0, 2);
  }
}

// The prefill state's arrays serve with one block of kDecodeRows rows; o is [rows, d].
template <class M>
static void decode_step(const AttentionParams& p, const AttentionUnit& u, PrefillState<M>& st,
                        float* s, DecodeTiles& tiles, const DecodeTiles& next, Reach any,
                        Reach full) {
  const int64_t row_bytes = static_cast<int64_t>(p.d) * M::kElemBytes;
  const int64_t tile_cells = static_cast<int64_t>(kTile) * p.d / M::kPerCell;
  alignas(64) float mx[kDecodeRows], alpha[kDecodeRows];
  for (int i = 0; i < kDecodeRows; ++i) mx[i] = -INFINITY;
  const RowBounds bounds{st.lo, st.hi};
  const bool native = p.format == KvFormat::kNative;  // else decode_tile asks for what is next
  for (int t = 0; t < tiles.n; ++t) {
    Tile& tile = tiles.tile[t];
    const Tile& soon = t < next.n ? next.tile[t] : tile;
    decode_tile<M>(p, tile, soon, st.decoded + t * decoded_bytes<M>(p));
    const char* ahead = native ? soon.k : tile.k;
    const RowBounds* masked = within(tile, full) ? nullptr : &bounds;
    if (M::kConvert) convert_keys<M>(tile, p.d, st.k_buf);
    for (int i = 0; i < kTile; i += kDecodeKeys)
      scores_micro<M, Narrow, 1, kDecodeKeys, true>(
          st.q, kDecodeRows, tile.k + static_cast<int64_t>(i) * tile.k_stride, tile.k_stride,
          st.steps, tile.pos + i, masked, s + (t * kTile + i) * kDecodeRows, mx,
          ahead + i * row_bytes);
    if (M::kConvert || !within(tile, any))
      copy_values<M>(tile, any, p.d, reinterpret_cast<char*>(st.v_buf + t * tile_cells));
  }
  softmax_step<M, Narrow, 1>(s, kDecodeRows, tiles.n * kTile, p.scale * 1.44269504f, mx, st.m, st.l,
                             alpha);
  decode_values_rows<M>(u.row_count, s, tiles, native ? next : DecodeTiles(), p.d, alpha, st.o);
}

// One KV head of a unit: its rows, and its part of the state of all.
template <class M>
struct DecodeHead {
  AttentionUnit u;
  PrefillState<M> st;

  DecodeHead(const AttentionUnit& unit, const PrefillState<M>& all, int head, int d)
      : u(unit), st(all) {
    u.kv_head += head;
    u.heads = 1;
    const int64_t rows = int64_t{head} * kRowBlock;
    st.q += rows * st.steps;
    st.o += rows * d;
    st.m += rows, st.l += rows, st.lo += rows, st.hi += rows;
  }
};

// The same keys of the head that lies `heads` behind.
static inline DecodeTiles heads_behind(const AttentionParams& p, DecodeTiles tiles, int heads) {
  for (int t = 0; t < tiles.n; ++t) {
    tiles.tile[t].k += heads * p.k_layout.head_stride;
    tiles.tile[t].v += heads * p.v_layout.head_stride;
  }
  return tiles;
}

template <class M>
static PrefillState<M> decode_state(const AttentionParams& p, AttentionUnit u) {
  u.row_count = u.heads * kRowBlock;  // a block for each head
  return PrefillState<M>(p, u);
}

template <class M>
static void decode_unit(const AttentionParams& p, const AttentionUnit& u) {
  const PrefillState<M> all = decode_state<M>(p, u);
  const auto head = [&](int h) { return DecodeHead<M>(u, all, h, p.d); };
  alignas(64) float s[kDecodeTiles * kTile * kDecodeRows];
  for (int h = 0; h < u.heads; ++h) {
    DecodeHead<M> at = head(h);
    load_queries(p, at.u, at.st, kDecodeRows, kDecodeRows);
    std::memset(at.st.o, 0, static_cast<size_t>(kDecodeRows) * p.d * sizeof(float));
  }
  const int first = u.row_begin, last = u.row_begin + u.row_count - 1;
  const Reach any = rows_reach(p, u, first, last);
  const Reach full{row_reach(p, u, last).lo, row_reach(p, u, first).hi};
  TileWalk walk(p, u, any);
  DecodeTiles steps[2];
  const int most = chunk_tiles<M>(p.d) < kDecodeTiles ? chunk_tiles<M>(p.d) : kDecodeTiles;
  steps[0].n = walk.next(steps[0].tile, most);
  for (int i = 0; steps[i].n > 0; i ^= 1) {
    DecodeTiles& next = steps[i ^ 1];
    next.n = walk.next(next.tile, most);
    for (int h = 0; h < u.heads; ++h) {
      DecodeTiles tiles = heads_behind(p, steps[i], h);
      const DecodeTiles soon = h + 1 < u.heads ? heads_behind(p, steps[i], h + 1) : next;
      touch(soon);
      DecodeHead<M> at = head(h);
      decode_step<M>(p, at.u, at.st, s, tiles, soon, any, full);
    }
  }
  for (int h = 0; h < u.heads; ++h) {
    const DecodeHead<M> at = head(h);
    for (int i = 0; i < u.row_count; ++i)
      finish_row(p, at.u, i, at.st.o + static_cast<int64_t>(i) * p.d, at.st.m[i], at.st.l[i]);
  }
}

template <class M>
static void attention_unit_of(const AttentionParams& p, const AttentionUnit& u) {
  if (u.row_count <= kDecodeRows)
    decode_unit<M>(p, u);
  else
    prefill_unit<M>(p, u);
}

static void attention_unit(const AttentionParams& p, const AttentionUnit& u) {
  if (p.bf16)
    attention_unit_of<Bf16Mode>(p, u);
  else
    attention_unit_of<ModeF32>(p, u);
}

static int attention_max_rows(const AttentionParams& p) {
  return p.bf16 ? max_unit_rows<Bf16Mode>(p.d) : max_unit_rows<ModeF32>(p.d);
}

}  // namespace SPS_ISA_NS
}  // namespace sps
