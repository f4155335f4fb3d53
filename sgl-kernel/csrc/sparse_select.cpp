// From shares to lists of pages: `sparse.selection` of the runtime is the truth of it.
#include <algorithm>
#include <cmath>
#include <vector>

#include "sps/sparse.h"
#include "sps/thread_pool.h"

namespace sps {
namespace {

// The pages before a block, of which some may be forbidden.
struct Candidates {
  const float* share;
  const uint8_t* allowed;  // null: all are
  int pages;
  bool may(int page) const { return allowed == nullptr || allowed[page] != 0; }
};

bool always_kept(int page, int pages, const SelectSettings& s) {
  return page < s.sink || page >= pages - s.window;
}

// Allowed pages: those that are always kept, then the others.
std::vector<int32_t> candidates_in_order(const Candidates& c, const SelectSettings& s) {
  std::vector<int32_t> order;
  order.reserve(c.pages);
  for (const bool always : {true, false})
    for (int j = 0; j < c.pages; ++j)
      if (c.may(j) && always_kept(j, c.pages, s) == always) order.push_back(j);
  return order;
}

// The smallest set whose complement has a share of at most tau, within budget and minimum; a byte a
// page. Of equal shares the earlier page goes first.
void select(const Candidates& c, int own_pages, const SelectSettings& s, uint8_t* kept) {
  for (int j = 0; j < c.pages; ++j) kept[j] = s.tau <= 0 && s.budget >= 1 && c.may(j);
  if (s.tau <= 0 && s.budget >= 1) return;
  std::vector<int32_t> order = candidates_in_order(c, s);
  const auto found = static_cast<int64_t>(order.size());
  int64_t always = 0;
  while (always < found && always_kept(order[always], c.pages, s)) ++always;
  const auto budget = static_cast<int64_t>(std::ceil(s.budget * (c.pages + own_pages)));
  const int64_t most = std::max<int64_t>(s.minimum, budget) - own_pages;
  const int64_t least = std::max<int64_t>(always, int64_t{s.minimum} - own_pages);
  const int64_t top = std::min(found, std::max(most, least));
  std::partial_sort(order.begin() + always, order.begin() + top, order.end(),
                    [&](int32_t a, int32_t b) {
                      return c.share[a] != c.share[b] ? c.share[a] > c.share[b] : a < b;
                    });
  int64_t count = top;
  if (s.tau > 0) {
    double rest = 0.0;
    for (int64_t i = top; i < found; ++i) rest += c.share[order[i]];
    while (count > least && rest + c.share[order[count - 1]] <= s.tau)
      rest += c.share[order[--count]];
  }
  for (int64_t i = 0; i < count; ++i) kept[order[i]] = 1;
}

int pages_before(const SelectParams& p, int64_t block) {
  return p.blocks[block].position / p.page;
}

// Blocks [first, last) of one superblock and KV head: a byte a page of each. A superblock of a single
// token reads all pages: it might as well be a generated one.
void select_superblock(const SelectParams& p, int64_t first, int64_t last, int head,
                       uint8_t* kept) {
  const int before = pages_before(p, first);
  const auto at = [&](int64_t i) { return p.share_begin[i] + int64_t{head} * pages_before(p, i); };
  if (last - first == 1 && p.blocks[first].count == 1) {
    std::fill_n(kept + at(first), before, uint8_t{1});
    return;
  }
  std::vector<uint8_t> allowed(pages_before(p, last - 1), 1);
  if (p.settings.superblocks && before > 0) {
    std::vector<float> norm(before);
    for (int64_t i = first; i < last; ++i)
      for (int j = 0; j < before; ++j) norm[j] += p.shares[at(i) + j] * p.shares[at(i) + j];
    for (float& x : norm) x = std::sqrt(x);
    select({norm.data(), nullptr, before}, 0, p.settings, allowed.data());
  }
  for (int64_t i = first; i < last; ++i)
    select({p.shares + at(i), allowed.data(), pages_before(p, i)}, p.settings.own_pages,
           p.settings, kept + at(i));
}

// Where the lists of each (block, KV head) begin, and how long they are.
void lay_out(const SelectParams& p, const uint8_t* kept) {
  int32_t ids = 0, dropped = 0;
  for (int64_t i = 0; i < p.count; ++i) {
    const QueryBlock& b = p.blocks[i];
    const int before = pages_before(p, i), own = (b.count + p.page - 1) / p.page;
    for (int head = 0; head < p.kv_heads; ++head) {
      const uint8_t* at = kept + p.share_begin[i] + int64_t{head} * before;
      const auto n = static_cast<int32_t>(std::count(at, at + before, 1));
      const int64_t item = i * p.kv_heads + head;
      p.items[item] = {b.row, b.count, b.position, ids, n + own, b.kv_len, head, 1};
      p.dropped[2 * item] = dropped;
      p.dropped[2 * item + 1] = before - n;
      ids += n + own;
      dropped += before - n;
    }
  }
  p.totals[0] = ids;
  p.totals[1] = dropped;
}

void write_lists(const SelectParams& p, int64_t item, const uint8_t* kept) {
  const int64_t block = item / p.kv_heads, head = item % p.kv_heads;
  const int before = pages_before(p, block);
  const int32_t* pages = p.page_ids + p.blocks[block].list_begin;
  const uint8_t* at = kept + p.share_begin[block] + head * before;
  int64_t id = p.items[item].list_begin, dropped = p.dropped[2 * item];
  const int own = (p.blocks[block].count + p.page - 1) / p.page;
  for (int j = 0; j < before + own; ++j) {
    if (j < before && at[j] == 0) {
      p.dropped_ids[dropped++] = pages[j];
      continue;
    }
    p.ids[id] = pages[j];
    p.positions[id++] = j * p.page;
  }
}

}  // namespace

void select_pages(const SelectParams& params, int threads) {
  const SelectParams& p = params;
  std::vector<int64_t> first{0};  // blocks that begin a superblock, and the end
  for (int64_t i = 1; i < p.count; ++i)
    if (p.blocks[i].superblock != p.blocks[i - 1].superblock) first.push_back(i);
  first.push_back(p.count);
  int64_t total = 0;
  for (int64_t i = 0; i < p.count; ++i) total += int64_t{p.kv_heads} * pages_before(p, i);
  std::vector<uint8_t> kept(total + 1);
  if (p.count > 0)
    parallel_for(threads, (static_cast<int64_t>(first.size()) - 1) * p.kv_heads, [&](int64_t i) {
      const int64_t at = i / p.kv_heads;
      select_superblock(p, first[at], first[at + 1], static_cast<int>(i % p.kv_heads),
                        kept.data());
    });
  lay_out(p, kept.data());
  parallel_for(threads, p.count * p.kv_heads, [&](int64_t i) { write_lists(p, i, kept.data()); });
}

}  // namespace sps
