// Python's view of copies, look-ups, sums over ranks, and angles.
#include <cmath>

#include "bind/module.h"
#include "bind/program.h"
#include "sps/moves.h"

namespace sps::bind {
namespace {

CopyParams copy_params(const Tensor& src, const Tensor& out) {
  src.need_float().need_last_contiguous();
  out.need_float().need_last_contiguous();
  if (src.ndim != 2 && src.ndim != 3) value_error("src: needs 2 or 3 dims");
  if (src.ndim == 3)
    out.need_shape({src.shape[0], src.shape[1], src.shape[2]});
  else
    out.need_shape({src.shape[0], src.shape[1]});
  const bool three = src.ndim == 3;
  return {src.data,
          out.data,
          src.byte_stride(0),
          three ? src.byte_stride(1) : 0,
          out.byte_stride(0),
          three ? out.byte_stride(1) : 0,
          src.shape[0],
          three ? src.shape[1] : 1,
          src.shape[src.ndim - 1],
          src.dtype == DType::kBf16,
          out.dtype == DType::kBf16};
}

void py_copy(nb::handle src_, nb::handle out_) {
  const CopyParams p = copy_params(Tensor(src_, "src"), Tensor(out_, "out", true));
  submit("copy", {src_, out_}, [p] { copy(p); });
}

void py_add(nb::handle src_, nb::handle out_) {
  const Tensor src(src_, "src"), out(out_, "out", true);
  out.need_dtype(src.dtype);
  const CopyParams p = copy_params(src, out);
  submit("add", {src_, out_}, [p] { add(p); });
}

bool wide_integers(const Tensor& t) {
  if (t.dtype != DType::kI32 && t.dtype != DType::kI64)
    value_error(t.name + ": must be int32 or int64");
  return t.dtype == DType::kI64;
}

void py_look_up(nb::handle ids_, nb::handle table_, nb::handle out_) {
  const Tensor ids(ids_, "ids"), table(table_, "table"), out(out_, "out", true);
  ids.need_ndim(1).need_contiguous();
  table.need_ndim(2).need_float().need_last_contiguous();
  out.need_dtype(table.dtype).need_shape({ids.shape[0], table.shape[1]}).need_last_contiguous();
  const LookUpParams p{ids.data,
                       wide_integers(ids),
                       table.data,
                       table.byte_stride(0),
                       table.shape[0],
                       table.shape[1] * table.item_bytes(),
                       out.data,
                       out.byte_stride(0),
                       ids.shape[0]};
  submit("look_up", {ids_, table_, out_}, [p] { look_up(p); });
}

void py_sum_parts(nb::handle parts_, nb::handle out_) {
  const Tensor parts(parts_, "parts"), out(out_, "out", true);
  parts.need_float().need_contiguous();
  out.need_dtype(parts.dtype).need_contiguous();
  if (parts.ndim < 2 || parts.shape[0] < 1) value_error("parts: needs 2 dims and one part");
  if (out.size() * parts.shape[0] != parts.size()) value_error("out: needs the size of a part");
  const SumParams p{parts.data,     out.size() * out.item_bytes(), parts.shape[0],
                    out.size(),     out.data,                      parts.dtype == DType::kBf16};
  submit("sum_parts", {parts_, out_}, [p] { sum_parts(p); });
}

void py_rope_angles(nb::handle positions_, nb::handle frequencies_, double scale,
                    nb::handle out_) {
  const Tensor positions(positions_, "positions"), frequencies(frequencies_, "frequencies"),
      out(out_, "out", true);
  positions.need_ndim(1).need_contiguous();
  frequencies.need_ndim(1).need_dtype(DType::kF32).need_contiguous();
  out.need_dtype(DType::kF32).need_shape({positions.shape[0], 2 * frequencies.shape[0]});
  out.need_last_contiguous();
  if (!std::isfinite(scale)) value_error("scale must be finite");
  const AngleParams p{positions.data,
                      wide_integers(positions),
                      frequencies.as<float>(),
                      static_cast<float>(scale),
                      out.as<float>(),
                      out.stride[0],
                      positions.shape[0],
                      frequencies.shape[0]};
  submit("rope_angles", {positions_, frequencies_, out_}, [p] { rope_angles(p); });
}

}  // namespace

void bind_moves(nb::module_& m) {
  m.def("copy", &py_copy);
  m.def("add", &py_add);
  m.def("look_up", &py_look_up);
  m.def("sum_parts", &py_sum_parts);
  m.def("rope_angles", &py_rope_angles);
}

}  // namespace sps::bind
