// Cuts summaries, shares and the tail into units and runs them.
#include "sps/sparse.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "sps/cpu.h"
#include "sps/kernel_table.h"
#include "sps/scratch.h"
#include "sps/thread_pool.h"

namespace sps {

SummaryLayout summary_layout(int page, int d, bool bf16) {
  const int64_t vector = int64_t{d} * (bf16 ? 2 : 4);
  return {page,       d,          bf16,       0, vector, 2 * vector, 3 * vector, 4 * vector,
          4 * vector + int64_t{page} * d / 4};
}

void summarise_pages(const SummariseParams& params, int64_t count, int threads) {
  const KernelTable& table = kernels();
  parallel_for(threads, count * params.kv_heads,
               [&](int64_t i) { table.summarise_range(params, i, i + 1); });
}

void page_shares(const ShareParams& params, const QueryBlock* blocks, const int32_t* rows,
                 int64_t count, float* shares, const int64_t* share_begin, int threads) {
  std::vector<ShareUnit> units;
  for (int64_t first = 0, last; first < count; first = last) {
    last = first + 1;
    while (last < count && last - first < kShareBlocks &&
           blocks[last].list_begin == blocks[first].list_begin &&
           blocks[last].position > blocks[last - 1].position)
      ++last;
    for (int head = 0; head < params.kv_heads; ++head) {
      ShareUnit u{};
      u.kv_head = head;
      for (int64_t i = first; i < last; ++i) {
        u.shares[u.count] =
            shares + share_begin[i] + int64_t{head} * (blocks[i].position / params.layout.page);
        u.rows[u.count] = rows[i];
        u.blocks[u.count++] = blocks[i];
      }
      units.push_back(u);
    }
  }
  const KernelTable& table = kernels();
  parallel_for(threads, static_cast<int64_t>(units.size()),
               [&](int64_t i) { table.page_share_unit(params, units[i]); });
}

namespace {

// The dropped pages of one block and KV head as keys and values one behind the other, in tiles.
struct Means {
  char *k, *v;
  int32_t *ids, *positions;
  int tiles;

  Means(const TailParams& p, const int32_t* dropped, int count, int kv_head) {
    const SummaryLayout& t = p.layout;
    tiles = (count + kTile - 1) / kTile;
    const int64_t vector = t.step - t.low, side = (int64_t{tiles} * kTile * vector + 63) / 64 * 64;
    k = static_cast<char*>(thread_scratch(2 * side + 8 * tiles, 1));
    v = k + side;
    ids = reinterpret_cast<int32_t*>(v + side);
    positions = ids + tiles;
    for (int i = 0; i < count; ++i) {
      const int64_t pool = dropped[i] / p.summaries.slots_per_pool;
      const char* summary = p.summaries.pools[pool] + kv_head * p.summaries.head_stride +
                            dropped[i] % p.summaries.slots_per_pool * p.summaries.slot_stride;
      std::memcpy(k + i * vector, summary + t.mean_k, vector);
      std::memcpy(v + i * vector, summary + t.mean_v, vector);
    }
    for (int i = 0; i < tiles; ++i) {
      ids[i] = i;
      positions[i] = i * kTile;
    }
  }
};

AttentionParams tail_attention_params(const TailParams& p) {
  AttentionParams a{};
  const int64_t vector = p.layout.step - p.layout.low;
  a.q = p.q;
  a.q_token_stride = p.q_token_stride;
  a.q_head_stride = p.q_head_stride;
  a.slots_per_pool = INT32_MAX;
  a.k_layout = a.v_layout = {kTile * vector, 0, vector};
  a.page = kTile;
  a.kv_heads = p.kv_heads;
  a.group = p.group;
  a.d = p.layout.d;
  a.bf16 = p.layout.bf16;
  a.format = KvFormat::kNative;
  a.out = reinterpret_cast<char*>(p.out);
  a.out_token_stride = p.out_token_stride;
  a.out_head_stride = p.out_head_stride;
  a.lse = p.lse;
  a.lse_token_stride = p.lse_token_stride;
  a.lse_head_stride = p.lse_head_stride;
  a.scale = p.scale;
  a.accumulate = p.accumulate;
  return a;
}

void shift_lse(const TailParams& p, const QueryBlock& block, int kv_head, float by) {
  for (int t = 0; t < block.count; ++t)
    for (int g = 0; g < p.group; ++g)
      p.lse[(int64_t{block.row} + t) * p.lse_token_stride +
            (int64_t{kv_head} * p.group + g) * p.lse_head_stride] += by;
}

// Attention over the means, each of which weighs as a page's tokens do: what it is merged into is
// made as much lighter meanwhile.
void tail_unit(const TailParams& p, const QueryBlock& block, int kv_head, const int32_t* dropped,
               int count) {
  const Means means(p, dropped, count, kv_head);
  AttentionParams a = tail_attention_params(p);
  const char *k = means.k, *v = means.v;
  a.k_pools = &k;
  a.v_pools = &v;
  a.page_ids = means.ids;
  a.page_pos = means.positions;
  const float log_tokens = std::log(static_cast<float>(p.layout.page));
  if (p.accumulate) shift_lse(p, block, kv_head, -log_tokens);
  const KernelTable& table = kernels();
  const int rows = block.count * p.group, most = table.attention_max_rows(a);
  for (int first = 0; first < rows; first += most)
    table.attention_unit(a, {block.row, 0, kv_head, first, std::min(most, rows - first), 0,
                             means.tiles, count, nullptr, nullptr});
  shift_lse(p, block, kv_head, log_tokens);
}

}  // namespace

void tail_attention(const TailParams& params, int threads) {
  parallel_for(threads, params.count * params.kv_heads, [&](int64_t i) {
    const int32_t first = params.dropped[2 * i], count = params.dropped[2 * i + 1];
    if (count > 0)
      tail_unit(params, params.blocks[i / params.kv_heads], static_cast<int>(i % params.kv_heads),
                params.dropped_ids + first, count);
  });
}

}  // namespace sps
