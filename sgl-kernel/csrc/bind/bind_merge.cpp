// Python's view of merge_states.
#include "bind/module.h"
#include "bind/tensor.h"
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
  for (size_t i = 0; i < n; ++i) {
    keep.emplace_back(os[i], "o");
    keep.emplace_back(lses[i], "lse");
    parts.push_back(view(keep[2 * i], keep[2 * i + 1], out));
  }
  check_threads(threads);
  const MergeParams p{parts.data(),  static_cast<int>(n),           view(out, lse_out, out),
                      out.shape[0], static_cast<int>(out.shape[1]), static_cast<int>(out.shape[2])};
  nb::gil_scoped_release release;
  merge_states(p, threads);
}

}  // namespace

void bind_merge(nb::module_& m) { m.def("merge_states", &merge); }

}  // namespace sps::bind
