// Python's view of merge_states.
#include "bind/module.h"
#include "bind/program.h"
#include "sps/merge.h"

namespace sps::bind {
namespace {

StateView view(const Tensor& o, const Tensor& lse, const Tensor& like) {
  o.need_float().need_shape({like.shape[0], like.shape[1], like.shape[2]});
  o.need_last_contiguous();
  lse.need_dtype(DType::kF32).need_shape({like.shape[0], like.shape[1]});
  return {o.data,         o.byte_stride(0), o.byte_stride(1),        lse.as<float>(),
          lse.stride[0], lse.stride[1],    o.dtype == DType::kBf16};
}

void merge(nb::sequence os, nb::sequence lses, nb::handle out_, nb::handle lse_out_, int threads) {
  const size_t n = nb::len(os);
  if (n == 0 || n > static_cast<size_t>(kMaxMergeParts) || nb::len(lses) != n)
    value_error("need as many o as lse, between 1 and 256");
  const Tensor out(out_, "out", true), lse_out(lse_out_, "lse_out", true);
  out.need_ndim(3);
  if (out.shape[2] < 1 || out.shape[2] > 512) value_error("out: head dim must be in [1, 512]");
  std::vector<Tensor> keep;
  keep.reserve(2 * n);
  std::vector<StateView> parts;
  std::vector<nb::handle> objects{out_, lse_out_};
  for (size_t i = 0; i < n; ++i) {
    objects.push_back(os[i]);
    keep.emplace_back(objects.back(), "o");
    objects.push_back(lses[i]);
    keep.emplace_back(objects.back(), "lse");
    parts.push_back(view(keep[2 * i], keep[2 * i + 1], out));
  }
  check_threads(threads);
  MergeParams p{nullptr,      static_cast<int>(n),           view(out, lse_out, out),
                out.shape[0], static_cast<int>(out.shape[1]), static_cast<int>(out.shape[2])};
  submit("merge", objects, [p, parts, threads]() mutable {
    p.parts = parts.data();
    merge_states(p, threads);
  });
}

}  // namespace

void bind_merge(nb::module_& m) { m.def("merge_states", &merge); }

}  // namespace sps::bind
