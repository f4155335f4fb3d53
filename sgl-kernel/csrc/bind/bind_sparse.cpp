// Python's view of sparse attention's operators.
#include <algorithm>
#include <cmath>
#include <memory>
#include <string>
#include <vector>

#include "bind/module.h"
#include "bind/program.h"
#include "sps/sparse.h"

namespace sps::bind {
namespace {

constexpr int64_t kMaxDim = 512;

void check_page(int64_t page, int64_t d) {
  if (page < kTile || page > 4096 || page % kTile != 0)
    value_error("page size must be a multiple of 16 in [16, 4096]");
  if (d < 16 || d > kMaxDim || d % 8 != 0)
    value_error("head dim must be a multiple of 8 in [16, 512]");
}

int64_t summary_nbytes(int64_t page, int64_t d, int64_t itemsize) {
  check_page(page, d);
  if (itemsize != 2 && itemsize != 4) value_error("itemsize must be 2 or 4");
  return summary_layout(static_cast<int>(page), static_cast<int>(d), itemsize == 2).nbytes;
}

// One layer's arrays in several pools, of equal strides; those without slots are never read.
class PoolArrays {
 public:
  PoolArrays(nb::sequence arrays, const char* name, int ndim) {
    for (nb::handle array : arrays) {
      objects.append(array);
      tensors_.emplace_back(array, name);
      const Tensor& t = tensors_.back();
      t.need_ndim(ndim).need_last_contiguous();
      pointers.push_back(t.data);
      slots.push_back(t.shape[0]);
      if (t.shape[0] > 0 && (some_ < 0 || tensors_[some_].shape[0] < t.shape[0]))
        some_ = static_cast<int>(tensors_.size()) - 1;
    }
    for (const Tensor& t : tensors_) check_alike(t);
  }

  bool empty() const { return some_ < 0; }
  const Tensor& some() const { return tensors_[some_]; }

  nb::list objects;
  std::vector<const char*> pointers;
  std::vector<int64_t> slots;

 private:
  void check_alike(const Tensor& t) const {
    if (t.shape[0] == 0) return;
    const Tensor& like = some();
    t.need_dtype(like.dtype);
    for (int j = 1; j < like.ndim; ++j)
      if (t.shape[j] != like.shape[j]) value_error(t.name + ": all pools must have the same shape");
    for (int j = 0; j < like.ndim - 1; ++j)
      if (t.shape[j] > 1 && t.stride[j] != like.stride[j])
        value_error(t.name + ": all pools must have the same strides");
  }

  std::vector<Tensor> tensors_;
  int some_ = -1;
};

// Summaries and what they are of.
struct Summaries {
  PoolArrays arrays;
  SummaryLayout layout;
  int64_t slots_per_pool;

  Summaries(nb::sequence pools, int64_t slots, int64_t page, int64_t d, bool bf16, int64_t heads)
      : arrays(pools, "summaries", 3), slots_per_pool(slots) {
    check_page(page, d);
    layout = summary_layout(static_cast<int>(page), static_cast<int>(d), bf16);
    if (slots < 1) value_error("slots must be positive");
    if (arrays.empty()) return;
    arrays.some().need_dtype(DType::kU8).need_shape({-1, heads, layout.nbytes});
    for (int64_t n : arrays.slots)
      if (n > slots) value_error("summaries: a pool has more slots than `slots`");
  }

  SummaryPools view() const {
    if (arrays.empty()) return {arrays.pointers.data(), slots_per_pool, 0, 0};
    return {arrays.pointers.data(), slots_per_pool, arrays.some().byte_stride(0),
            arrays.some().byte_stride(1)};
  }
};

void check_ids(const int32_t* ids, int64_t count, const std::vector<int64_t>& slots,
               int64_t slots_per_pool, const char* what) {
  for (int64_t i = 0; i < count; ++i) {
    const int64_t pool = ids[i] < 0 ? -1 : ids[i] / slots_per_pool;
    if (pool < 0 || pool >= static_cast<int64_t>(slots.size()) ||
        ids[i] - pool * slots_per_pool >= slots[pool])
      value_error(std::string(what) + ": page id lies outside the pools");
  }
}

// Blocks as rows of int32; each lies within q and its sequence's page ids.
const QueryBlock* check_blocks(const Tensor& blocks, int64_t tokens, int64_t n_ids, int page) {
  blocks.need_dtype(DType::kI32).need_shape({-1, 6}).need_contiguous();
  const QueryBlock* all = blocks.as<QueryBlock>();
  for (int64_t i = 0; i < blocks.shape[0]; ++i) {
    const QueryBlock& b = all[i];
    if (b.row < 0 || b.count < 1 || int64_t{b.row} + b.count > tokens)
      value_error("blocks: rows lie outside q");
    if (b.position < 0 || b.position % page != 0 || int64_t{b.position} + b.count > INT32_MAX)
      value_error("blocks: a position must be a multiple of the page");
    const int64_t pages = b.position / page + (b.count + page - 1) / page;
    if (b.list_begin < 0 || b.list_begin + pages > n_ids)
      value_error("blocks: pages lie outside page_ids");
    if (i > 0 && all[i - 1].superblock == b.superblock &&
        (all[i - 1].list_begin != b.list_begin || all[i - 1].position >= b.position))
      value_error("blocks: those of a superblock must stand together in order of position");
  }
  return all;
}

void check_queries(const Tensor& q, const SummaryLayout& layout, int64_t kv_heads) {
  q.need_ndim(3).need_dtype(layout.bf16 ? DType::kBf16 : DType::kF32).need_last_contiguous();
  if (q.shape[2] != layout.d) value_error("q: head dim differs from the pools'");
  if (kv_heads < 1 || q.shape[1] < 1 || q.shape[1] % kv_heads != 0)
    value_error("q: heads must be a multiple of the KV heads");
}

bool is_bf16(const Tensor& q) { return q.need_float().dtype == DType::kBf16; }

void check_scale(double scale) {
  if (!(scale > 0) || !std::isfinite(scale)) value_error("scale must be positive and finite");
}

void summarise(nb::handle k_, nb::handle v_, nb::handle slots_, nb::handle out_, int threads) {
  const Tensor k(k_, "k"), v(v_, "v"), slots(slots_, "slots"), out(out_, "out", true);
  k.need_ndim(4).need_float().need_last_contiguous();
  v.need_dtype(k.dtype).need_last_contiguous();
  v.need_shape({k.shape[0], k.shape[1], k.shape[2], k.shape[3]});
  slots.need_dtype(DType::kI32).need_ndim(1).need_contiguous();
  check_page(k.shape[2], k.shape[3]);
  check_threads(threads);
  SummariseParams p{};
  p.layout = summary_layout(static_cast<int>(k.shape[2]), static_cast<int>(k.shape[3]), is_bf16(k));
  out.need_dtype(DType::kU8).need_shape({k.shape[0], k.shape[1], p.layout.nbytes});
  out.need_last_contiguous();
  p.k = k.data;
  p.v = v.data;
  p.k_layout = {k.byte_stride(0), k.byte_stride(1), k.byte_stride(2)};
  p.v_layout = {v.byte_stride(0), v.byte_stride(1), v.byte_stride(2)};
  p.kv_heads = static_cast<int>(k.shape[1]);
  p.slots = slots.as<int32_t>();
  p.out = out.data;
  p.out_slot_stride = out.byte_stride(0);
  p.out_head_stride = out.byte_stride(1);
  for (int64_t i = 0; i < slots.shape[0]; ++i)
    if (p.slots[i] < 0 || p.slots[i] >= k.shape[0]) value_error("slots: outside the pool");
  submit("summarise_pages", {k_, v_, slots_, out_},
         [p, count = slots.shape[0], threads] { summarise_pages(p, count, threads); });
}

// Number of shares; fills `begin` with where each block's are.
int64_t lay_out_shares(const QueryBlock* blocks, int64_t count, int page, int64_t kv_heads,
                       int64_t* begin) {
  int64_t at = 0;
  for (int64_t i = 0; i < count; ++i) {
    begin[i] = at;
    at += kv_heads * (blocks[i].position / page);
  }
  return at;
}

void shares(nb::handle q_, nb::handle blocks_, nb::handle ids_, nb::sequence summaries_,
            nb::sequence k_pools_, int64_t slots, nb::handle out_, nb::handle rows_, double scale,
            int threads) {
  const Tensor q(q_, "q"), blocks(blocks_, "blocks"), ids(ids_, "page_ids"),
      out(out_, "shares", true), rows(rows_, "rows");
  const PoolArrays k(k_pools_, "k_pools", 4);
  if (k.empty()) value_error("k_pools: no pool has a slot");
  const Tensor& some = k.some();
  const Summaries s(summaries_, slots, some.shape[2], some.shape[3], is_bf16(q), some.shape[1]);
  check_queries(q, s.layout, some.shape[1]);
  some.need_dtype(q.dtype);
  check_scale(scale);
  check_threads(threads);
  ids.need_dtype(DType::kI32).need_ndim(1).need_contiguous();
  const QueryBlock* all = check_blocks(blocks, q.shape[0], ids.shape[0], s.layout.page);
  const int64_t count = blocks.shape[0];
  rows.need_dtype(DType::kI32).need_shape({count}).need_contiguous();
  for (int64_t i = 0; i < count; ++i)
    if (rows.as<int32_t>()[i] < 1 || rows.as<int32_t>()[i] > all[i].count)
      value_error("rows: a block scores one to all of its rows");
  auto begin = std::make_shared<std::vector<int64_t>>(count);
  const int64_t size =
      lay_out_shares(all, count, s.layout.page, some.shape[1], begin->data());
  out.need_dtype(DType::kF32).need_shape({size}).need_contiguous();
  for (int64_t i = 0; i < count; ++i) {
    const int64_t before = all[i].position / s.layout.page;
    const int64_t own = (all[i].count + s.layout.page - 1) / s.layout.page;
    const int32_t* first = ids.as<int32_t>() + all[i].list_begin;
    if (i == 0 || all[i - 1].superblock != all[i].superblock || i + 1 == count ||
        all[i + 1].superblock != all[i].superblock)
      check_ids(first, before, s.arrays.slots, slots, "summaries");
    check_ids(first + before, own, k.slots, slots, "k_pools");
  }
  ShareParams p{q.data,
                q.byte_stride(0),
                q.byte_stride(1),
                static_cast<int>(some.shape[1]),
                static_cast<int>(q.shape[1] / some.shape[1]),
                s.layout,
                s.view(),
                nullptr,
                {some.byte_stride(0), some.byte_stride(1), some.byte_stride(2)},
                ids.as<int32_t>(),
                static_cast<float>(scale)};
  submit("page_shares", {q_, blocks_, ids_, s.arrays.objects, k.objects, out_, rows_},
         [p, all, count, begin, threads, scored = rows.as<int32_t>(), to = out.as<float>(),
          summaries = s.arrays.pointers, keys = k.pointers]() mutable {
           p.summaries.pools = summaries.data();
           p.k_pools = keys.data();
           page_shares(p, all, scored, count, to, begin->data(), threads);
         });
}

void select(nb::handle shares_, nb::handle blocks_, nb::handle ids_, int64_t page, int64_t kv_heads,
            nb::tuple settings, nb::tuple out, int threads) {
  const Tensor shares(shares_, "shares"), blocks(blocks_, "blocks"), ids(ids_, "page_ids");
  const Tensor items(out[0], "items", true), chosen(out[1], "ids", true),
      positions(out[2], "positions", true), dropped(out[3], "dropped", true),
      dropped_ids(out[4], "dropped_ids", true), totals(out[5], "totals", true);
  check_page(page, 16);
  check_threads(threads);
  if (kv_heads < 1) value_error("kv_heads must be positive");
  ids.need_dtype(DType::kI32).need_ndim(1).need_contiguous();
  const QueryBlock* all =
      check_blocks(blocks, INT32_MAX, ids.shape[0], static_cast<int>(page));
  const int64_t count = blocks.shape[0];
  auto begin = std::make_shared<std::vector<int64_t>>(count);
  const int64_t size =
      lay_out_shares(all, count, static_cast<int>(page), kv_heads, begin->data());
  shares.need_dtype(DType::kF32).need_shape({size}).need_contiguous();
  int64_t own = 0;
  for (int64_t i = 0; i < count; ++i) own += kv_heads * ((all[i].count + page - 1) / page);
  items.need_dtype(DType::kI32).need_shape({count * kv_heads, 8}).need_contiguous();
  for (const Tensor* t : {&chosen, &positions})
    t->need_dtype(DType::kI32).need_shape({size + own}).need_contiguous();
  dropped.need_dtype(DType::kI32).need_shape({count * kv_heads, 2}).need_contiguous();
  dropped_ids.need_dtype(DType::kI32).need_shape({size}).need_contiguous();
  totals.need_dtype(DType::kI64).need_shape({2}).need_contiguous();
  if (size + own > INT32_MAX) value_error("too many pages for int32 lists; take fewer blocks");
  SelectSettings s{nb::cast<double>(settings[0]), nb::cast<double>(settings[1]),
                   nb::cast<int>(settings[2]),    nb::cast<int>(settings[3]),
                   nb::cast<int>(settings[4]),    nb::cast<int>(settings[5]),
                   nb::cast<bool>(settings[6])};
  SelectParams p{all,
                 count,
                 static_cast<int>(kv_heads),
                 static_cast<int>(page),
                 shares.as<float>(),
                 nullptr,
                 ids.as<int32_t>(),
                 s,
                 items.as<AttentionItem>(),
                 chosen.as<int32_t>(),
                 positions.as<int32_t>(),
                 dropped.as<int32_t>(),
                 dropped_ids.as<int32_t>(),
                 totals.as<int64_t>()};
  submit("select_pages", {shares_, blocks_, ids_, out}, [p, begin, threads]() mutable {
    p.share_begin = begin->data();
    select_pages(p, threads);
  });
}

void tail(nb::handle q_, nb::handle blocks_, nb::handle dropped_, nb::handle dropped_ids_,
          nb::sequence summaries_, int64_t slots, int64_t page, nb::handle out_, nb::handle lse_,
          double scale, bool accumulate, int threads) {
  const Tensor q(q_, "q"), blocks(blocks_, "blocks"), dropped(dropped_, "dropped"),
      ids(dropped_ids_, "dropped_ids"), out(out_, "out", true), lse(lse_, "lse", true);
  q.need_ndim(3);
  const int64_t count = blocks.shape[0];
  dropped.need_dtype(DType::kI32).need_shape({-1, 2}).need_contiguous();
  if (count > 0 && (dropped.shape[0] < 1 || dropped.shape[0] % count != 0))
    value_error("dropped: needs a row for each block and KV head");
  const int64_t kv_heads = count > 0 ? dropped.shape[0] / count : 1;
  const Summaries s(summaries_, slots, page, q.shape[2], is_bf16(q), kv_heads);
  check_queries(q, s.layout, kv_heads);
  check_scale(scale);
  check_threads(threads);
  ids.need_dtype(DType::kI32).need_ndim(1).need_contiguous();
  out.need_dtype(DType::kF32).need_shape({q.shape[0], q.shape[1], q.shape[2]});
  out.need_last_contiguous();
  lse.need_dtype(DType::kF32).need_shape({q.shape[0], q.shape[1]});
  const QueryBlock* all = check_blocks(blocks, q.shape[0], INT32_MAX, 1);
  const int32_t* ranges = dropped.as<int32_t>();
  for (int64_t i = 0; i < dropped.shape[0]; ++i)
    if (ranges[2 * i] < 0 || ranges[2 * i + 1] < 0 ||
        int64_t{ranges[2 * i]} + ranges[2 * i + 1] > ids.shape[0])
      value_error("dropped: range lies outside dropped_ids");
  check_ids(ids.as<int32_t>(), ids.shape[0], s.arrays.slots, slots, "dropped_ids");
  TailParams p{q.data,
               q.byte_stride(0),
               q.byte_stride(1),
               static_cast<int>(kv_heads),
               static_cast<int>(q.shape[1] / kv_heads),
               s.layout,
               s.view(),
               all,
               count,
               ranges,
               ids.as<int32_t>(),
               out.as<float>(),
               out.byte_stride(0),
               out.byte_stride(1),
               lse.as<float>(),
               lse.stride[0],
               lse.stride[1],
               static_cast<float>(scale),
               accumulate};
  submit("tail_attention", {q_, blocks_, dropped_, dropped_ids_, s.arrays.objects, out_, lse_},
         [p, threads, summaries = s.arrays.pointers]() mutable {
           p.summaries.pools = summaries.data();
           tail_attention(p, threads);
         });
}

}  // namespace

void bind_sparse(nb::module_& m) {
  m.def("summary_nbytes", &summary_nbytes);
  m.def("summarise_pages", &summarise);
  m.def("page_shares", &shares);
  m.def("select_pages", &select);
  m.def("tail_attention", &tail);
}

}  // namespace sps::bind
