// Python's view of packed weights and of the checksum that guards them on disk.
#include <cstring>

#include "bind/module.h"
#include "bind/program.h"
#include "sps/crc32c.h"
#include "sps/packed.h"
#include "sps/quant.h"

namespace sps::bind {
namespace {

PackedLayout layout_of(int64_t n, int64_t k, const char* kind, int64_t group) {
  if (n < 0 || k < 0) value_error("n and k must not be negative");
  if (group < 1) value_error("group must be positive");
  PackedLayout layout{PackedKind::kBf16, n, k, group};
  if (std::strcmp(kind, "fp32") == 0)
    layout.kind = PackedKind::kF32;
  else if (std::strcmp(kind, "int8") == 0)
    layout.kind = PackedKind::kInt8;
  else if (std::strcmp(kind, "int4") == 0)
    layout.kind = PackedKind::kInt4;
  else if (std::strcmp(kind, "bf16") != 0)
    value_error(std::string("kind must be bf16, fp32, int8 or int4, is ") + kind);
  if (quantized(layout.kind) && (group % 32 != 0 || group > kQuantMaxGroup))
    value_error("group must be a multiple of 32 up to 256");
  return layout;
}

const Tensor& need_packed(const Tensor& packed, const PackedLayout& layout) {
  return packed.need_dtype(DType::kU8).need_shape({packed_bytes(layout)}).need_contiguous();
}

int64_t packed_nbytes(int64_t n, int64_t k, const char* kind, int64_t group) {
  return packed_bytes(layout_of(n, k, kind, group));
}

PackParams pack_params(const Tensor& weight, const Tensor& packed, const PackedLayout& layout) {
  weight.need_float().need_shape({layout.n, layout.k}).need_last_contiguous();
  need_packed(packed, layout);
  return {layout, packed.data, weight.data, weight.byte_stride(0), weight.dtype == DType::kBf16};
}

void pack(nb::handle weight_, const char* kind, nb::handle out_, int64_t group, int threads) {
  const Tensor weight(weight_, "weight"), out(out_, "out", true);
  weight.need_ndim(2);
  check_threads(threads);
  const PackedLayout layout = layout_of(weight.shape[0], weight.shape[1], kind, group);
  const PackParams params = pack_params(weight, out, layout);
  nb::gil_scoped_release release;
  pack_weight(params, threads);
}

void unpack(nb::handle packed_, const char* kind, int64_t group, nb::handle out_) {
  const Tensor packed(packed_, "packed"), out(out_, "out", true);
  out.need_ndim(2);
  const PackedLayout layout = layout_of(out.shape[0], out.shape[1], kind, group);
  const PackParams params = pack_params(out, packed, layout);
  nb::gil_scoped_release release;
  unpack_weight(params);
}

void need_slice(const PackedLinearParams& p) {
  const int64_t n = p.layout.n, k = p.layout.k;
  const auto whole = [](int64_t at, int64_t of, int64_t end) { return at % of == 0 || at == end; };
  if (p.row_begin < 0 || p.row_end < p.row_begin || p.row_end > n ||
      !whole(p.row_begin, kPanelOutputs, n) || !whole(p.row_end, kPanelOutputs, n))
    value_error("rows must begin and end at multiples of 16 (or at n) within [0, n]");
  const int64_t pair = p.layout.kind == PackedKind::kBf16 ? 2 : 1;
  const int64_t cell = quantized(p.layout.kind) ? p.layout.group : pair;
  if (p.column_begin < 0 || p.column_end < p.column_begin || p.column_end > k ||
      !whole(p.column_begin, cell, k) || !whole(p.column_end, cell, k))
    value_error("columns must begin and end at multiples of " + std::to_string(cell) +
                " (or at k) within [0, k]");
}

struct Range {
  int64_t begin, end;
};

Range range_of(nb::handle pair, int64_t all) {
  if (pair.is_none()) return {0, all};
  return {nb::cast<int64_t>(pair[0]), nb::cast<int64_t>(pair[1])};
}

void linear(nb::handle x_, nb::handle packed_, int64_t n, int64_t k, const char* kind,
            nb::handle bias_, nb::handle out_, nb::handle rows, nb::handle columns,
            int64_t group, int threads) {
  const Tensor x(x_, "x"), packed(packed_, "packed"), out(out_, "out", true);
  check_threads(threads);
  PackedLinearParams p{};
  p.layout = layout_of(n, k, kind, group);
  const Range row = range_of(rows, n), column = range_of(columns, k);
  p.row_begin = row.begin;
  p.row_end = row.end;
  p.column_begin = column.begin;
  p.column_end = column.end;
  need_slice(p);
  const int64_t width = row.end - row.begin;
  need_packed(packed, p.layout);
  x.need_shape({-1, column.end - column.begin}).need_last_contiguous();
  if (quantized(p.layout.kind))
    x.need_float();
  else
    x.need_dtype(p.layout.kind == PackedKind::kF32 ? DType::kF32 : DType::kBf16);
  out.need_float().need_shape({x.shape[0], width}).need_last_contiguous();
  p.packed = packed.data;
  p.x = x.data;
  p.x_stride = x.byte_stride(0);
  p.x_bf16 = x.dtype == DType::kBf16;
  p.out = out.data;
  p.out_stride = out.byte_stride(0);
  p.out_bf16 = out.dtype == DType::kBf16;
  p.m = x.shape[0];
  if (!bias_.is_none()) {
    const Tensor bias(bias_, "bias");
    bias.need_float().need_shape({width}).need_contiguous();
    p.bias = bias.data;
    p.bias_bf16 = bias.dtype == DType::kBf16;
  }
  submit({x_, packed_, bias_, out_}, [p, threads] { packed_linear(p, threads); });
}

uint32_t checksum(nb::handle buffer_, int threads) {
  refuse_recording("crc32c");
  const Tensor buffer(buffer_, "buffer");
  buffer.need_dtype(DType::kU8).need_ndim(1).need_contiguous();
  check_threads(threads);
  nb::gil_scoped_release release;
  return crc32c_parallel(buffer.data, static_cast<size_t>(buffer.shape[0]), threads);
}

uint32_t checksum_generic(nb::handle buffer_) {
  const Tensor buffer(buffer_, "buffer");
  buffer.need_dtype(DType::kU8).need_ndim(1).need_contiguous();
  nb::gil_scoped_release release;
  return crc32c_generic(0, buffer.data, static_cast<size_t>(buffer.shape[0]));
}

}  // namespace

void bind_packed(nb::module_& m) {
  m.def("packed_nbytes", &packed_nbytes);
  m.def("pack_weight", &pack);
  m.def("unpack_weight", &unpack);
  m.def("packed_linear", &linear, nb::arg("x"), nb::arg("packed"), nb::arg("n"), nb::arg("k"),
        nb::arg("kind"), nb::arg("bias").none(), nb::arg("out"), nb::arg("rows").none(),
        nb::arg("columns").none(), nb::arg("group"), nb::arg("threads"));
  m.def("crc32c", &checksum);
  m.def("crc32c_generic", &checksum_generic);
}

}  // namespace sps::bind
