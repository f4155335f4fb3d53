// Which pages a block of queries reads, told from summaries of the pages; and what stands for the
// others. Parameters shared by the scheduler and the kernels.
#pragma once

#include <cstdint>

#include "sps/attention.h"

namespace sps {

// One page's and KV head's summary: mean key, mean value, low and step, d elements of the pages'
// dtype each, then codes [page, d / 4] bytes, four channels a byte, the first in its lowest bits:
// the key is low + code * step.
struct SummaryLayout {
  int page, d;
  bool bf16;
  int64_t mean_k, mean_v, low, step, codes;  // bytes from the summary's beginning
  int64_t nbytes;
};

SummaryLayout summary_layout(int page, int d, bool bf16);

// Summaries in several pools; page id = pool * slots_per_pool + slot.
struct SummaryPools {
  const char* const* pools;
  int64_t slots_per_pool, slot_stride, head_stride;  // strides in bytes
};

struct SummariseParams {
  const char *k, *v;
  PoolLayout k_layout, v_layout;
  int kv_heads;
  SummaryLayout layout;
  const int32_t* slots;
  char* out;
  int64_t out_slot_stride, out_head_stride;
};

// As Python's rows have it.
struct QueryBlock {
  int32_t row, count, position, superblock, list_begin, kv_len;
};

struct ShareParams {
  const char* q;
  int64_t q_token_stride, q_head_stride;
  int kv_heads, group;
  SummaryLayout layout;
  SummaryPools summaries;
  const char* const* k_pools;
  PoolLayout k_layout;
  const int32_t* page_ids;
  float scale;
};

// Consecutive blocks of one sequence, for one KV head; shares[i] has room for block i's pages.
constexpr int kShareBlocks = 4;
struct ShareUnit {
  QueryBlock blocks[kShareBlocks];
  int rows[kShareBlocks];  // that are scored, evenly spaced, the last among them
  float* shares[kShareBlocks];
  int count, kv_head;
};

struct SelectSettings {
  double tau, budget;
  int minimum, sink, window;
  int own_pages;    // of a whole block
  bool superblocks;  // blocks of one superblock choose from one set of the pages before it
};

struct SelectParams {
  const QueryBlock* blocks;
  int64_t count;
  int kv_heads, page;
  const float* shares;
  const int64_t* share_begin;  // [count]: of a block's first share, [kv_heads, pages before] each
  const int32_t* page_ids;
  SelectSettings settings;
  AttentionItem* items;     // [count, kv_heads]
  int32_t* ids;             // chosen pages, ...
  int32_t* positions;       // ... and where they begin
  int32_t* dropped;         // [count, kv_heads, 2]: first and number of dropped_ids
  int32_t* dropped_ids;
  int64_t* totals;          // [2]: entries of ids, entries of dropped_ids
};

struct TailParams {
  const char* q;
  int64_t q_token_stride, q_head_stride;
  int kv_heads, group;
  SummaryLayout layout;
  SummaryPools summaries;
  const QueryBlock* blocks;
  int64_t count;
  const int32_t* dropped;
  const int32_t* dropped_ids;
  float* out;
  int64_t out_token_stride, out_head_stride;  // in bytes
  float* lse;
  int64_t lse_token_stride, lse_head_stride;  // in elements
  float scale;
  bool accumulate;  // merge into what out and lse hold
};

void summarise_pages(const SummariseParams& params, int64_t count, int threads);
void page_shares(const ShareParams& params, const QueryBlock* blocks, const int32_t* rows,
                 int64_t count, float* shares, const int64_t* share_begin, int threads);
void select_pages(const SelectParams& params, int threads);
void tail_attention(const TailParams& params, int threads);

}  // namespace sps
