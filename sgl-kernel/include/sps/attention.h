// Partial attention over lists of KV pages: parameters shared by the scheduler and the kernels.
#pragma once

#include <cstdint>

#include "sps/kv_format.h"

namespace sps {

// Keys are read in tiles of this many tokens; a page holds a whole number of them.
constexpr int kTile = 16;

// Rows of one KV head up to which its keys and values are read once, in place; and KV heads that
// one unit then reads side by side, page by page.
constexpr int kFewRows = 8;
constexpr int kUnitHeads = 4;

// All strides in bytes unless said otherwise; the last dim of q, k, v and out is contiguous.
struct PoolLayout {
  int64_t slot_stride, head_stride, token_stride;
};

struct AttentionParams {
  const char* q;
  int64_t q_token_stride, q_head_stride;
  const char* const* k_pools;
  const char* const* v_pools;
  int64_t slots_per_pool;
  PoolLayout k_layout, v_layout;
  int page, kv_heads, group, d;
  bool bf16;      // dtype of q, and of k and v in native pages: bfloat16, else float32
  KvFormat format;
  bool out_bf16;  // dtype of out
  char* out;
  int64_t out_token_stride, out_head_stride;
  float* lse;
  int64_t lse_token_stride, lse_head_stride;  // in elements
  const int32_t* page_ids;
  const int32_t* page_pos;
  float scale;
  bool causal;
  int window;       // 0: none
  bool accumulate;  // merge into what out and lse hold
};

// Rows of one item and KV head are (token, query head of the group), token-major: row r is token
// q_begin + r / group, query head kv_head * group + r % group, position q_pos + r / group.
struct AttentionUnit {
  int64_t q_begin;
  int q_pos, kv_head;
  int row_begin, row_count;
  int64_t list_begin;
  int list_count, kv_len;
  // Where a part of a split list goes (o [rows, d], lse [rows]); null: to out and lse.
  float* part_o;
  float* part_lse;
  int heads = 1;  // KV heads from kv_head on: several only of few rows, whole lists
};

struct AttentionItem {
  int32_t q_begin, q_count, q_pos, list_begin, list_count, kv_len, head_begin, head_count;
};

// Cuts the items into units and runs them on `threads` threads. Throws std::invalid_argument when
// an item or a page lies outside its array.
void paged_attention(const AttentionParams& params, const AttentionItem* items, int64_t n_items,
                     int64_t tokens, int64_t n_pages, int n_pools, int threads);

}  // namespace sps
