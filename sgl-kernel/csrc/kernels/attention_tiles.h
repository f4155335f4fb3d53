// Walking a page list tile by tile, and preparing tiles for the multiplications.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels/kv_rows.h"
#include "kernels/modes.h"
#include "sps/attention.h"

namespace sps {
namespace SPS_ISA_NS {

constexpr int kMaxHeadDim = 512;

// kTile keys at consecutive positions from pos; strides in bytes from key to key.
struct Tile {
  const char* k;
  const char* v;
  int32_t k_stride, v_stride;
  int32_t pos;
};

// Positions that some row of a block attends to: lo..hi, both included.
struct Reach {
  int lo, hi;
};

static inline Reach row_reach(const AttentionParams& p, const AttentionUnit& u, int row) {
  const int64_t pos = u.q_pos + row / p.group;
  int64_t hi = u.kv_len - 1, lo = 0;
  if (p.causal && pos < hi) hi = pos;
  if (p.window > 0 && pos - p.window + 1 > lo) lo = pos - p.window + 1;
  return {static_cast<int>(lo), static_cast<int>(hi)};
}

// Rows of a unit are in order of position, so the first and last rows bound the rest.
static inline Reach rows_reach(const AttentionParams& p, const AttentionUnit& u, int first,
                               int last) {
  return {row_reach(p, u, first).lo, row_reach(p, u, last).hi};
}

// Walks the tiles of a unit's list that lie within reach.
class TileWalk {
 public:
  TileWalk(const AttentionParams& p, const AttentionUnit& u, Reach reach)
      : p_(p), u_(u), reach_(reach) {}

  // Fills up to `n` tiles with pointers into the pools; returns how many.
  int next(Tile* tiles, int n) {
    int count = 0;
    while (count < n && index_ < u_.list_count) {
      if (offset_ == 0 && !locate()) {
        ++index_;
        continue;
      }
      const int pos = page_pos_ + offset_;
      if (pos <= reach_.hi && pos + kTile > reach_.lo) tiles[count++] = tile_at(pos);
      offset_ += kTile;
      if (offset_ >= p_.page || pos + kTile > reach_.hi) {
        offset_ = 0;
        ++index_;
      }
    }
    return count;
  }

 private:
  // Finds the current page; false when all of it is out of reach.
  bool locate() {
    const int64_t at = u_.list_begin + index_;
    page_pos_ = p_.page_pos[at];
    if (page_pos_ > reach_.hi || page_pos_ + p_.page <= reach_.lo) return false;
    const int64_t id = p_.page_ids[at], pool = id / p_.slots_per_pool;
    const int64_t slot = id - pool * p_.slots_per_pool;
    k_page_ = p_.k_pools[pool] + slot * p_.k_layout.slot_stride +
              u_.kv_head * p_.k_layout.head_stride;
    v_page_ = p_.v_pools[pool] + slot * p_.v_layout.slot_stride +
              u_.kv_head * p_.v_layout.head_stride;
    return true;
  }

  Tile tile_at(int pos) const {
    const int64_t ks = p_.k_layout.token_stride, vs = p_.v_layout.token_stride;
    return {k_page_ + offset_ * ks, v_page_ + offset_ * vs, static_cast<int32_t>(ks),
            static_cast<int32_t>(vs), pos};
  }

  const AttentionParams& p_;
  const AttentionUnit& u_;
  const Reach reach_;
  int index_ = 0, offset_ = 0, page_pos_ = 0;
  const char* k_page_ = nullptr;
  const char* v_page_ = nullptr;
};

static inline bool within(const Tile& t, Reach r) {
  return t.pos >= r.lo && t.pos + kTile - 1 <= r.hi;
}

// Keys out of reach may never have been written: probability 0 times NaN is NaN, so their values
// must not be read. Row i of a tile, or zeros.
static inline const char* value_row(const Tile& t, Reach reach, int i) {
  alignas(64) static const char zeros[kMaxHeadDim * 4] = {};
  const int pos = t.pos + i;
  return pos >= reach.lo && pos <= reach.hi ? t.v + static_cast<int64_t>(i) * t.v_stride : zeros;
}

// Copies (or converts to float) the values of a tile into buf, zeros where out of reach.
template <class M>
static void copy_values(Tile& t, Reach reach, int d, char* buf) {
  const int row_bytes = d * (M::kConvert ? 4 : M::kElemBytes);
  for (int i = 0; i < kTile; ++i) {
    const char* src = value_row(t, reach, i);
    char* dst = buf + i * row_bytes;
    if (M::kConvert)
      M::convert_row(src, reinterpret_cast<float*>(dst), d);
    else
      std::memcpy(dst, src, row_bytes);
  }
  t.v = buf;
  t.v_stride = row_bytes;
}

template <class M>
static void convert_keys(Tile& t, int d, float* buf) {
  for (int i = 0; i < kTile; ++i)
    M::convert_row(t.k + static_cast<int64_t>(i) * t.k_stride, buf + i * d, d);
  t.k = reinterpret_cast<const char*>(buf);
  t.k_stride = d * 4;
}

// Bytes that a decoded tile takes: K, then V, [kTile, d] each.
template <class M>
static size_t decoded_bytes(const AttentionParams& p) {
  return p.format == KvFormat::kNative ? 0 : 2 * static_cast<size_t>(kTile) * p.d * M::kElemBytes;
}

// Asks for the rows of a quantised tile; a row's last bytes come with the row behind it.
static inline void prefetch_row(const char* rows, int64_t stride, int i) {
  for (int64_t at = 0; at < stride; at += 64) __builtin_prefetch(rows + i * stride + at, 0, 2);
}

template <class M, class Row>
static void decode_rows(Tile& t, int d, const Tile& soon, char* buf) {
  const int row_bytes = d * M::kElemBytes;
  char* v = buf + kTile * row_bytes;
  for (int i = 0; i < kTile; ++i) {
    prefetch_row(soon.k, soon.k_stride, i);
    prefetch_row(soon.v, soon.v_stride, i);
    decode_row<Row, M::kElemBytes>(t.k + static_cast<int64_t>(i) * t.k_stride, d,
                                   buf + i * row_bytes);
    decode_row<Row, M::kElemBytes>(t.v + static_cast<int64_t>(i) * t.v_stride, d,
                                   v + i * row_bytes);
  }
  t.k = buf;
  t.v = v;
  t.k_stride = t.v_stride = row_bytes;
}

// Turns a tile of quantised rows into one of the queries' dtype, in `buf`. Rows that were never
// written decode to anything: they are masked, or left out, as native ones are. `soon` is asked for
// meanwhile.
template <class M>
static void decode_tile(const AttentionParams& p, Tile& t, const Tile& soon, char* buf) {
  if (p.format == KvFormat::kInt8)
    decode_rows<M, Int8Row>(t, p.d, soon, buf);
  else if (p.format == KvFormat::kFp8)
    decode_rows<M, Fp8Row>(t, p.d, soon, buf);
}

// Hands out pieces of one scratch buffer, each aligned to 64 bytes.
class Pieces {
 public:
  static constexpr size_t rounded(size_t bytes) { return (bytes + 63) / 64 * 64; }
  explicit Pieces(void* base) : at_(static_cast<char*>(base)) {}
  template <class T>
  T* take(size_t count) {
    T* piece = reinterpret_cast<T*>(at_);
    at_ += rounded(count * sizeof(T));
    return piece;
  }

 private:
  char* at_;
};

}  // namespace SPS_ISA_NS
}  // namespace sps
