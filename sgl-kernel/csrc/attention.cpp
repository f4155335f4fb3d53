// Checks the items of a paged-attention call, cuts them into units and runs the units.
#include "sps/attention.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "sps/cpu.h"
#include "sps/kernel_table.h"
#include "sps/thread_pool.h"

namespace sps {
namespace {

[[noreturn]] void fail(int64_t item, const char* what) {
  throw std::invalid_argument("item " + std::to_string(item) + ": " + what);
}

void check_item(const AttentionParams& p, const AttentionItem& it, int64_t i, int64_t tokens,
                int64_t n_pages, int64_t n_ids) {
  if (it.q_begin < 0 || it.q_count < 0 || int64_t{it.q_begin} + it.q_count > tokens)
    fail(i, "query rows lie outside q");
  if (it.q_pos < 0 || int64_t{it.q_pos} + it.q_count > INT32_MAX) fail(i, "bad q_pos");
  if (it.kv_len < 0) fail(i, "kv_len is negative");
  if (it.head_begin < 0 || it.head_count < 0 ||
      int64_t{it.head_begin} + it.head_count > p.kv_heads)
    fail(i, "KV heads lie outside the pools");
  if (it.list_begin < 0 || it.list_count < 0 ||
      int64_t{it.list_begin} + it.list_count > n_pages)
    fail(i, "page range lies outside page_ids");
  for (int64_t j = it.list_begin; j < int64_t{it.list_begin} + it.list_count; ++j) {
    if (p.page_ids[j] < 0 || p.page_ids[j] >= n_ids) fail(i, "page id lies outside the pools");
    if (p.page_pos[j] < 0 || p.page_pos[j] > INT32_MAX - p.page) fail(i, "bad page position");
  }
}

// A unit whose page list is cut into several parts, computed apart and merged.
struct SplitUnit {
  AttentionUnit unit;
  int parts;
  int64_t o_at, lse_at;  // of part 0 in the buffers
};

class Plan {
 public:
  Plan(const AttentionParams& p, const AttentionItem* items, int64_t n, int threads) : p_(p) {
    max_rows_ = kernels().attention_max_rows(p);
    together_ = threads == 1 ? kUnitHeads : 1;
    for (int64_t i = 0; i < n; ++i) add_item(items[i]);
    if (threads > 1 && static_cast<int>(units_.size()) < 4 * threads) split(threads);
  }

  void run(int threads) {
    const KernelTable& table = kernels();
    parallel_for(threads, static_cast<int64_t>(units_.size()),
                 [&](int64_t i) { table.attention_unit(p_, units_[i]); });
    parallel_for(threads, static_cast<int64_t>(splits_.size()), [&](int64_t i) {
      const SplitUnit& s = splits_[i];
      table.attention_write_merged(p_, s.unit, &o_[s.o_at], &lse_[s.lse_at], s.parts);
    });
  }

 private:
  void add_item(const AttentionItem& it) {
    const int64_t rows = int64_t{it.q_count} * p_.group;
    if (rows > 0 && rows <= kFewRows) return add_few(it, static_cast<int>(rows));
    for (int h = 0; h < it.head_count; ++h)
      for (int64_t r = 0; r < rows; r += max_rows_)
        units_.push_back({it.q_begin, it.q_pos, it.head_begin + h, static_cast<int>(r),
                          static_cast<int>(std::min<int64_t>(max_rows_, rows - r)),
                          it.list_begin, it.list_count, it.kv_len, nullptr, nullptr, 1});
  }

  // The heads of a page lie side by side, and so do pages whose slots do: read in this order they
  // are long runs of memory, as the processor's prefetchers want them.
  void add_few(const AttentionItem& it, int rows) {
    for (int h = 0; h < it.head_count; h += together_) {
      AttentionUnit u{it.q_begin,    it.q_pos,   it.head_begin + h, 0,      rows, it.list_begin,
                      it.list_count, it.kv_len, nullptr,           nullptr};
      u.heads = std::min(together_, it.head_count - h);
      units_.push_back(u);
    }
  }

  // Too few units for the threads (a long context being decoded): cut the page lists.
  void split(int threads) {
    const int least = std::max(1, 512 / p_.page);  // pages that are worth a part
    std::vector<AttentionUnit> whole;
    whole.swap(units_);
    int64_t o_size = 0, lse_size = 0;
    for (const AttentionUnit& u : whole) {
      const int want = (4 * threads + static_cast<int>(whole.size()) - 1) /
                       static_cast<int>(whole.size());
      const int parts = std::max(1, std::min(want, u.list_count / least));
      if (parts == 1) {
        units_.push_back(u);
        continue;
      }
      splits_.push_back({u, parts, o_size, lse_size});
      o_size += int64_t{parts} * u.row_count * p_.d;
      lse_size += int64_t{parts} * u.row_count;
    }
    o_.resize(o_size);
    lse_.resize(lse_size);
    for (const SplitUnit& s : splits_) add_parts(s);
  }

  void add_parts(const SplitUnit& s) {
    for (int i = 0; i < s.parts; ++i) {
      AttentionUnit u = s.unit;
      const int64_t count = s.unit.list_count;
      const int64_t begin = count * i / s.parts, end = count * (i + 1) / s.parts;
      u.list_begin += begin;
      u.list_count = static_cast<int>(end - begin);
      u.part_o = &o_[s.o_at + int64_t{i} * u.row_count * p_.d];
      u.part_lse = &lse_[s.lse_at + int64_t{i} * u.row_count];
      units_.push_back(u);
    }
  }

  const AttentionParams& p_;
  int64_t max_rows_;
  int together_;  // KV heads of a unit of few rows
  std::vector<AttentionUnit> units_;
  std::vector<SplitUnit> splits_;
  std::vector<float> o_, lse_;
};

}  // namespace

void paged_attention(const AttentionParams& params, const AttentionItem* items, int64_t n_items,
                     int64_t tokens, int64_t n_pages, int n_pools, int threads) {
  const int64_t n_ids = int64_t{n_pools} * params.slots_per_pool;
  for (int64_t i = 0; i < n_items; ++i)
    check_item(params, items[i], i, tokens, n_pages, n_ids);
  Plan(params, items, n_items, threads).run(threads);
}

}  // namespace sps
