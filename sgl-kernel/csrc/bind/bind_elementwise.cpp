// Python's view of RMSNorm, rope with KV write and SiLU-mul.
#include <cmath>
#include <string>
#include <stdexcept>
#include <string>

#include <nanobind/stl/string.h>

#include "bind/module.h"
#include "bind/program.h"
#include "sps/elementwise.h"

namespace sps::bind {
namespace {

// Rows of a 2- or 3-dim array: [n, dim] counts as [n, 1, dim].
Rows rows_of(const Tensor& t) {
  return {t.data, t.byte_stride(0), t.ndim == 3 ? t.byte_stride(1) : 0};
}

void same_shape(const Tensor& t, const Tensor& like) {
  t.need_dtype(like.dtype).need_last_contiguous();
  if (like.ndim == 3)
    t.need_shape({like.shape[0], like.shape[1], like.shape[2]});
  else
    t.need_shape({like.shape[0], like.shape[1]});
}

void py_rms_norm(nb::handle x_, nb::handle weight_, double eps, nb::handle residual_,
                 nb::handle out_, int threads) {
  const Tensor x(x_, "x"), weight(weight_, "weight"), out(out_, "out", true);
  x.need_float();
  if (x.ndim != 2 && x.ndim != 3) value_error("x: needs 2 or 3 dims");
  x.need_last_contiguous();
  same_shape(out, x);
  const int64_t dim = x.shape[x.ndim - 1];
  weight.need_float().need_shape({dim}).need_contiguous();
  if (!(eps >= 0) || !std::isfinite(eps)) value_error("eps must be finite and not negative");
  check_threads(threads);
  RmsNormParams p{};
  p.x = rows_of(x);
  p.out = rows_of(out);
  p.weight = weight.data;
  p.n = x.shape[0];
  p.m = x.ndim == 3 ? x.shape[1] : 1;
  p.dim = dim;
  p.eps = static_cast<float>(eps);
  p.bf16 = x.dtype == DType::kBf16;
  p.weight_bf16 = weight.dtype == DType::kBf16;
  if (!residual_.is_none()) {
    const Tensor residual(residual_, "residual", true);
    same_shape(residual, x);
    p.residual = rows_of(residual);
  }
  submit("rms_norm", {x_, weight_, residual_, out_}, [p, threads] { rms_norm(p, threads); });
}

void py_silu_mul(nb::handle gate_, nb::handle up_, nb::handle out_, int threads) {
  const Tensor gate(gate_, "gate"), up(up_, "up"), out(out_, "out", true);
  gate.need_ndim(2).need_float().need_last_contiguous();
  same_shape(up, gate);
  same_shape(out, gate);
  check_threads(threads);
  const SiluMulParams p{gate.data,           up.data,           out.data,
                        gate.byte_stride(0), up.byte_stride(0), out.byte_stride(0),
                        gate.shape[0],       gate.shape[1],     gate.dtype == DType::kBf16};
  submit("silu_mul", {gate_, up_, out_}, [p, threads] { silu_mul(p, threads); });
}

// Index values change from run to run of a recorded call, so they are checked in each.
struct IndexCheck {
  const char* name;
  const int32_t* values;
  int64_t n, low, high;

  IndexCheck(const char* name, const Tensor& t, int64_t n, int64_t low, int64_t high)
      : name(name), values(t.as<int32_t>()), n(n), low(low), high(high) {
    t.need_dtype(DType::kI32).need_shape({n}).need_contiguous();
  }

  void operator()() const {
    for (int64_t i = 0; i < n; ++i)
      if (values[i] < low || values[i] >= high)
        throw std::invalid_argument(std::string(name) + "[" + std::to_string(i) + "] = " +
                                    std::to_string(values[i]) + " lies outside [" +
                                    std::to_string(low) + ", " + std::to_string(high) + ")");
  }
};

void fill_rope(RopeParams& p, const Tensor& q, const Tensor& k, const Tensor& positions,
               const Tensor& cos_sin) {
  q.need_ndim(3).need_float().need_last_contiguous();
  k.need_dtype(q.dtype).need_shape({q.shape[0], -1, q.shape[2]}).need_last_contiguous();
  cos_sin.need_dtype(DType::kF32).need_ndim(2).need_last_contiguous();
  if (cos_sin.shape[1] % 2 != 0 || cos_sin.shape[1] > q.shape[2])
    value_error("cos_sin: the last dim must be even and at most the head dim");
  p.q = rows_of(q);
  p.k = rows_of(k);
  p.positions = positions.as<int32_t>();
  p.cos_sin = cos_sin.as<float>();
  p.cos_sin_stride = cos_sin.stride[0];
  p.tokens = q.shape[0];
  p.heads = static_cast<int>(q.shape[1]);
  p.kv_heads = static_cast<int>(k.shape[1]);
  p.d = static_cast<int>(q.shape[2]);
  p.rotary = static_cast<int>(cos_sin.shape[1]);
  p.bf16 = q.dtype == DType::kBf16;
}

void py_rope(nb::handle q_, nb::handle k_, nb::handle positions_, nb::handle cos_sin_,
             int threads) {
  const Tensor q(q_, "q", true), k(k_, "k", true), positions(positions_, "positions"),
      cos_sin(cos_sin_, "cos_sin");
  RopeParams p{};
  fill_rope(p, q, k, positions, cos_sin);
  check_threads(threads);
  const IndexCheck rows("positions", positions, p.tokens, 0, cos_sin.shape[0]);
  submit("rope", {q_, k_, positions_, cos_sin_}, [=] {
    rows();
    rope_kv_write(p, threads);
  });
}

void check_pool(const Tensor& pool, const Tensor& k, KvFormat format) {
  const bool native = format == KvFormat::kNative;
  if (!native && k.shape[2] > kMaxQuantizedDim) value_error("k: head dim is over 512");
  const int64_t row = native ? k.shape[2] : quantized_row(format, k.shape[2]);
  pool.need_dtype(native ? k.dtype : DType::kU8).need_shape({-1, k.shape[1], -1, row});
  pool.need_last_contiguous();
}

void py_rope_kv_write(nb::handle q_, nb::handle k_, nb::handle v_, nb::handle positions_,
                      nb::handle cos_sin_, nb::handle k_pool_, nb::handle v_pool_,
                      nb::handle slots_, nb::handle offsets_, const std::string& kv_format,
                      int threads) {
  const Tensor q(q_, "q", true), k(k_, "k", true), v(v_, "v"), positions(positions_, "positions"),
      cos_sin(cos_sin_, "cos_sin"), k_pool(k_pool_, "k_pool", true),
      v_pool(v_pool_, "v_pool", true), slots(slots_, "slots"), offsets(offsets_, "offsets");
  RopeParams p{};
  fill_rope(p, q, k, positions, cos_sin);
  same_shape(v, k);
  p.format = kv_format_of(kv_format);
  check_pool(k_pool, k, p.format);
  check_pool(v_pool, k, p.format);
  v_pool.need_shape({k_pool.shape[0], -1, k_pool.shape[2], -1});
  const IndexCheck rows("positions", positions, p.tokens, 0, cos_sin.shape[0]);
  const IndexCheck pages("slots", slots, p.tokens, INT32_MIN, k_pool.shape[0]);
  const IndexCheck places("offsets", offsets, p.tokens, 0, k_pool.shape[2]);
  check_threads(threads);
  p.v = v.data;
  p.v_stride_i = v.byte_stride(0);
  p.v_stride_j = v.byte_stride(1);
  p.k_pool = k_pool.data;
  p.v_pool = v_pool.data;
  p.k_slot = k_pool.byte_stride(0), p.v_slot = v_pool.byte_stride(0);
  p.k_head = k_pool.byte_stride(1), p.v_head = v_pool.byte_stride(1);
  p.k_token = k_pool.byte_stride(2), p.v_token = v_pool.byte_stride(2);
  p.slots = slots.as<int32_t>();
  p.offsets = offsets.as<int32_t>();
  submit("rope_kv_write",
         {q_, k_, v_, positions_, cos_sin_, k_pool_, v_pool_, slots_, offsets_}, [=] {
           rows(), pages(), places();
           rope_kv_write(p, threads);
         });
}

}  // namespace

void bind_elementwise(nb::module_& m) {
  m.def("rms_norm", &py_rms_norm, nb::arg("x"), nb::arg("weight"), nb::arg("eps"),
        nb::arg("residual").none(), nb::arg("out"), nb::arg("threads"));
  m.def("silu_mul", &py_silu_mul);
  m.def("rope", &py_rope);
  m.def("rope_kv_write", &py_rope_kv_write);
}

}  // namespace sps::bind
