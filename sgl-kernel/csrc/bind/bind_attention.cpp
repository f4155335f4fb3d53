// Python's view of paged attention: pools, shapes and dtypes are checked here.
#include <cmath>
#include <string>
#include <vector>

#include <nanobind/stl/string.h>

#include "bind/module.h"
#include "bind/program.h"
#include "sps/attention.h"

namespace sps::bind {
namespace {

constexpr int64_t kMaxDim = 512;

// The K and V arrays of one layer in every pool; keeps them alive.
class KVPools {
 public:
  KVPools(nb::sequence k, nb::sequence v, const std::string& format)
      : format_(kv_format_of(format)), format_name_(format) {
    const size_t n = nb::len(k);
    if (n == 0 || nb::len(v) != n)
      value_error("k and v: need the same number of pools, at least 1");
    keep_.reserve(2 * n);
    for (size_t i = 0; i < n; ++i) k_.push_back(add(k[i], "k"));
    for (size_t i = 0; i < n; ++i) v_.push_back(add(v[i], "v"));
    check();
  }

  KVPools(const KVPools&) = delete;
  KVPools& operator=(const KVPools&) = delete;

  void fill(AttentionParams& p) const {
    const Tensor& k = keep_.front();
    const Tensor& v = keep_[k_.size()];
    p.k_pools = k_.data();
    p.v_pools = v_.data();
    p.slots_per_pool = k.shape[0];
    p.k_layout = {k.byte_stride(0), k.byte_stride(1), k.byte_stride(2)};
    p.v_layout = {v.byte_stride(0), v.byte_stride(1), v.byte_stride(2)};
    p.kv_heads = static_cast<int>(k.shape[1]);
    p.page = static_cast<int>(k.shape[2]);
    p.d = static_cast<int>(head_dim());
    p.format = format_;
  }

  int count() const { return static_cast<int>(k_.size()); }
  const Tensor& first() const { return keep_.front(); }
  bool native() const { return format_ == KvFormat::kNative; }
  const std::string& format() const { return format_name_; }
  int64_t head_dim() const { return first().shape[3] - quantized_row(format_, 0); }

 private:
  char* add(nb::handle object, const char* name) {
    keep_.emplace_back(object, name);
    objects_.append(object);
    return keep_.back().data;
  }

  void check() const {
    const Tensor& k = keep_.front();
    k.need_ndim(4);
    if (k.shape[0] < 1 || k.shape[1] < 1) value_error("k: needs at least one slot and one head");
    if (k.shape[0] * count() > INT32_MAX) value_error("k: too many slots for int32 page ids");
    if (k.shape[2] < kTile || k.shape[2] > 4096 || k.shape[2] % kTile != 0)
      value_error("k: page size must be a multiple of 16 in [16, 4096]");
    if (head_dim() < 8 || head_dim() > kMaxDim || head_dim() % 8 != 0)
      value_error("k: head dim must be a multiple of 8 in [8, 512]");
    for (size_t i = 0; i < keep_.size(); ++i) {
      const Tensor& t = keep_[i];
      const Tensor& same_layout = keep_[i < k_.size() ? 0 : k_.size()];
      if (native()) t.need_float();
      t.need_dtype(native() ? k.dtype : DType::kU8).need_last_contiguous();
      t.need_shape({k.shape[0], k.shape[1], k.shape[2], k.shape[3]});
      for (int j = 0; j < 3; ++j)
        if (t.shape[j] > 1 && t.stride[j] != same_layout.stride[j])
          value_error(t.name + ": all pools must have the same strides");
      if (t.byte_stride(2) < 0 || t.byte_stride(2) > INT32_MAX)
        value_error(t.name + ": bad stride from token to token");
    }
  }

  KvFormat format_;
  std::string format_name_;
  std::vector<Tensor> keep_;
  std::vector<const char*> k_, v_;
  nb::list objects_;
};

void check_queries(const Tensor& q, const KVPools& kv, const AttentionParams& p) {
  q.need_ndim(3).need_float().need_last_contiguous();
  if (kv.native()) q.need_dtype(kv.first().dtype);
  if (q.shape[2] != p.d) value_error("q: head dim differs from the pools'");
  if (q.shape[1] < 1 || q.shape[1] % p.kv_heads != 0)
    value_error("q: heads must be a multiple of the pools' KV heads");
}

void attention(nb::handle q_, nb::handle kv_, nb::handle items_, nb::handle ids_,
               nb::handle pos_, nb::handle out_, nb::handle lse_, double scale, bool causal,
               int window, bool accumulate, int threads) {
  const KVPools& kv = nb::cast<const KVPools&>(kv_);
  AttentionParams p{};
  kv.fill(p);
  const Tensor q(q_, "q"), items(items_, "items"), ids(ids_, "page_ids"), pos(pos_, "page_pos"),
      out(out_, "out", true), lse(lse_, "lse", true);
  check_queries(q, kv, p);
  p.bf16 = q.dtype == DType::kBf16;
  items.need_dtype(DType::kI32).need_shape({-1, 8}).need_contiguous();
  ids.need_dtype(DType::kI32).need_ndim(1).need_contiguous();
  pos.need_dtype(DType::kI32).need_shape({ids.shape[0]}).need_contiguous();
  out.need_float().need_shape({q.shape[0], q.shape[1], q.shape[2]}).need_last_contiguous();
  lse.need_dtype(DType::kF32).need_shape({q.shape[0], q.shape[1]});
  if (!(scale > 0) || !std::isfinite(scale)) value_error("scale must be positive and finite");
  if (window < 0) value_error("window must not be negative");
  check_threads(threads);
  p.q = q.data;
  p.q_token_stride = q.byte_stride(0);
  p.q_head_stride = q.byte_stride(1);
  p.group = static_cast<int>(q.shape[1] / p.kv_heads);
  p.out = out.data;
  p.out_bf16 = out.dtype == DType::kBf16;
  p.out_token_stride = out.byte_stride(0);
  p.out_head_stride = out.byte_stride(1);
  p.lse = lse.as<float>();
  p.lse_token_stride = lse.stride[0];
  p.lse_head_stride = lse.stride[1];
  p.page_ids = ids.as<int32_t>();
  p.page_pos = pos.as<int32_t>();
  p.scale = static_cast<float>(scale);
  p.causal = causal;
  p.window = window;
  p.accumulate = accumulate;
  submit("attention", {q_, kv_, items_, ids_, pos_, out_, lse_},
         [p, items = items.as<AttentionItem>(), n_items = items.shape[0], tokens = q.shape[0],
          n_pages = ids.shape[0], pools = kv.count(),
          threads] { paged_attention(p, items, n_items, tokens, n_pages, pools, threads); });
}

}  // namespace

void bind_attention(nb::module_& m) {
  nb::class_<KVPools>(m, "KVPools")
      .def(nb::init<nb::sequence, nb::sequence, const std::string&>(), nb::arg("k"), nb::arg("v"),
           nb::arg("format") = "native")
      .def_prop_ro("pools", &KVPools::count)
      .def_prop_ro("slots", [](const KVPools& s) { return s.first().shape[0]; })
      .def_prop_ro("kv_heads", [](const KVPools& s) { return s.first().shape[1]; })
      .def_prop_ro("page_size", [](const KVPools& s) { return s.first().shape[2]; })
      .def_prop_ro("head_dim", &KVPools::head_dim)
      .def_prop_ro("format", &KVPools::format)
      .def_prop_ro("dtype", [](const KVPools& s) { return dtype_name(s.first().dtype); });
  m.def("paged_attention", &attention);
}

}  // namespace sps::bind
