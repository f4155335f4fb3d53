// Python's view of sampling.
#include <cmath>

#include "bind/module.h"
#include "bind/program.h"
#include "sps/sampling.h"

namespace sps::bind {
namespace {

void check(bool ok, const char* message) {
  if (!ok) value_error(message);
}

int64_t py_sample(nb::handle logits_, double uniform, double temperature, int64_t top_k,
                  double top_p, double min_p) {
  refuse_recording("sample");
  const Tensor logits(logits_, "logits");
  logits.need_ndim(1).need_float().need_contiguous();
  check(logits.shape[0] >= 1 && logits.shape[0] <= INT32_MAX, "logits: bad length");
  check(uniform >= 0 && uniform < 1, "uniform must be in [0, 1)");
  check(temperature >= 0 && std::isfinite(temperature), "temperature must be finite and >= 0");
  check(top_p > 0 && top_p <= 1, "top_p must be in (0, 1]");
  check(min_p >= 0 && min_p <= 1, "min_p must be in [0, 1]");
  const SamplingParams p{logits.data, logits.shape[0], logits.dtype == DType::kBf16,
                         temperature, top_k,           top_p,
                         min_p,       uniform};
  int64_t token;
  {
    nb::gil_scoped_release release;
    token = sample(p);
  }
  check(token >= 0, "logits: no value above -inf");
  return token;
}

void py_largest(nb::handle logits_, nb::handle out_) {
  const Tensor logits(logits_, "logits"), out(out_, "out", true);
  logits.need_ndim(2).need_dtype(DType::kF32).need_contiguous();
  out.need_dtype(DType::kI64).need_shape({logits.shape[0]}).need_contiguous();
  check(logits.shape[1] >= 1, "logits: empty rows");
  const float* x = logits.as<float>();
  int64_t* to = out.as<int64_t>();
  const int64_t rows = logits.shape[0], n = logits.shape[1];
  submit("largest", {logits_, out_}, [x, to, rows, n] {
    for (int64_t r = 0; r < rows; ++r) to[r] = largest(x + r * n, n);
  });
}

}  // namespace

void bind_sampling(nb::module_& m) {
  m.def("sample", &py_sample);
  m.def("largest", &py_largest);
}

}  // namespace sps::bind
