// Python's view of small_gemm.
#include "bind/module.h"
#include "bind/program.h"
#include "sps/gemm.h"

namespace sps::bind {
namespace {

void gemm(nb::handle x_, nb::handle w_, nb::handle bias_, nb::handle y_, int threads) {
  const Tensor x(x_, "x"), w(w_, "w"), y(y_, "out", true);
  x.need_ndim(2).need_float().need_last_contiguous();
  w.need_dtype(x.dtype).need_shape({-1, x.shape[1]}).need_last_contiguous();
  y.need_float().need_shape({x.shape[0], w.shape[0]}).need_last_contiguous();
  check_threads(threads);
  SmallGemmParams p{};
  p.x = x.data;
  p.x_stride = x.byte_stride(0);
  p.w = w.data;
  p.w_stride = w.byte_stride(0);
  p.y = y.data;
  p.y_stride = y.byte_stride(0);
  p.m = x.shape[0];
  p.n = w.shape[0];
  p.k = x.shape[1];
  p.bf16 = x.dtype == DType::kBf16;
  p.y_bf16 = y.dtype == DType::kBf16;
  if (!bias_.is_none()) {
    const Tensor bias(bias_, "bias");
    bias.need_float().need_shape({w.shape[0]}).need_contiguous();
    p.bias = bias.data;
    p.bias_bf16 = bias.dtype == DType::kBf16;
  }
  submit("small_gemm", {x_, w_, bias_, y_}, [p, threads] { small_gemm(p, threads); });
}

}  // namespace

void bind_gemm(nb::module_& m) {
  m.def("small_gemm", &gemm, nb::arg("x"), nb::arg("w"), nb::arg("bias").none(), nb::arg("out"),
        nb::arg("threads"));
}

}  // namespace sps::bind
