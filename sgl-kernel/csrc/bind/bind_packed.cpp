// Python's view of packed weights and of the checksum that guards them on disk.
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "bind/module.h"
#include "bind/program.h"
#include "sps/crc32c.h"
#include "sps/packed.h"
#include "sps/packed_rows.h"
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

// Columns that must not be parted.
int64_t unit_of(const PackedLayout& layout) {
  if (quantized(layout.kind)) return layout.group;
  return layout.kind == PackedKind::kBf16 ? 2 : 1;
}

using Cuts = std::vector<int64_t>;

// A part of a weight along k, packed by itself.
struct Slice {
  PackedLayout layout;
  int64_t column, offset;  // its first column, and where it lies among the packed bytes
};

struct Slices {
  std::vector<Slice> slices;
  int64_t nbytes = 0;

  Slices(const PackedLayout& whole, Cuts cuts) {
    cuts.push_back(whole.k);
    int64_t begin = 0;
    for (size_t i = 0; i < cuts.size(); begin = cuts[i++]) {
      const bool last = i + 1 == cuts.size();
      if (cuts[i] < begin || cuts[i] > whole.k || (!last && cuts[i] % unit_of(whole) != 0))
        value_error("cuts must ascend within [0, k] by multiples of " +
                    std::to_string(unit_of(whole)));
      PackedLayout layout = whole;
      layout.k = cuts[i] - begin;
      slices.push_back({layout, begin, nbytes});
      nbytes += packed_bytes(layout);
    }
  }
};

const Tensor& need_packed(const Tensor& packed, const Slices& slices) {
  return packed.need_dtype(DType::kU8).need_shape({slices.nbytes}).need_contiguous();
}

int64_t packed_nbytes(int64_t n, int64_t k, const char* kind, int64_t group, const Cuts& cuts) {
  return Slices(layout_of(n, k, kind, group), cuts).nbytes;
}

// Calls f for each slice with its parameters.
template <class F>
void over_slices(const Tensor& weight, const Tensor& packed, const char* kind, int64_t group,
                 const Cuts& cuts, F&& f) {
  weight.need_ndim(2);
  const PackedLayout layout = layout_of(weight.shape[0], weight.shape[1], kind, group);
  weight.need_float().need_last_contiguous();
  const Slices slices(layout, cuts);
  need_packed(packed, slices);
  nb::gil_scoped_release release;
  for (const Slice& s : slices.slices)
    f(PackParams{s.layout, packed.data + s.offset, weight.data + s.column * weight.item_bytes(),
                 weight.byte_stride(0), weight.dtype == DType::kBf16});
}

void pack(nb::handle weight_, const char* kind, nb::handle out_, int64_t group, int threads,
          const Cuts& cuts) {
  const Tensor weight(weight_, "weight"), out(out_, "out", true);
  check_threads(threads);
  over_slices(weight, out, kind, group, cuts,
              [&](const PackParams& params) { pack_weight(params, threads); });
}

void unpack(nb::handle packed_, const char* kind, int64_t group, nb::handle out_,
            const Cuts& cuts) {
  const Tensor packed(packed_, "packed"), out(out_, "out", true);
  over_slices(out, packed, kind, group, cuts,
              [](const PackParams& params) { unpack_weight(params); });
}

void need_rows(const PackedLayout& layout, int64_t begin, int64_t end) {
  const auto whole = [&](int64_t at) { return at % kPanelOutputs == 0 || at == layout.n; };
  if (begin < 0 || end < begin || end > layout.n || !whole(begin) || !whole(end))
    value_error("rows must begin and end at multiples of 16 (or at n) within [0, n]");
}

// Columns [begin, end) of each slice that has some; one piece at least.
std::vector<PackedPiece> pieces_of(const Slices& slices, const char* packed, int64_t begin,
                                   int64_t end) {
  std::vector<PackedPiece> pieces;
  for (const Slice& s : slices.slices) {
    const int64_t first = std::max(begin - s.column, int64_t{0});
    const int64_t last = std::min(end - s.column, s.layout.k);
    if (first < last || (pieces.empty() && &s == &slices.slices.back()))
      pieces.push_back({s.layout, panel_bytes(s.layout), packed + s.offset, first,
                        std::max(first, last)});
  }
  return pieces;
}

void need_columns(const PackedLayout& layout, int64_t begin, int64_t end) {
  const int64_t unit = unit_of(layout);
  const auto whole = [&](int64_t at) { return at % unit == 0 || at == layout.k; };
  if (begin < 0 || end < begin || end > layout.k || !whole(begin) || !whole(end))
    value_error("columns must begin and end at multiples of " + std::to_string(unit) +
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
            int64_t group, int threads, const Cuts& cuts) {
  const Tensor x(x_, "x"), packed(packed_, "packed"), out(out_, "out", true);
  check_threads(threads);
  PackedLinearParams p{};
  p.layout = layout_of(n, k, kind, group);
  const Range row = range_of(rows, n), column = range_of(columns, k);
  p.row_begin = row.begin;
  p.row_end = row.end;
  need_rows(p.layout, row.begin, row.end);
  need_columns(p.layout, column.begin, column.end);
  const int64_t width = row.end - row.begin;
  const Slices slices(p.layout, cuts);
  need_packed(packed, slices);
  p.pieces = pieces_of(slices, packed.data, column.begin, column.end);
  x.need_shape({-1, column.end - column.begin}).need_last_contiguous();
  if (quantized(p.layout.kind))
    x.need_float();
  else
    x.need_dtype(p.layout.kind == PackedKind::kF32 ? DType::kF32 : DType::kBf16);
  out.need_float().need_shape({x.shape[0], width}).need_last_contiguous();
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
  const std::string shape = std::to_string(width) + "x" + std::to_string(x.shape[1]);
  submit(recording() == nullptr ? "linear" : "linear " + shape, {x_, packed_, bias_, out_},
         [p, threads] { packed_linear(p, threads); });
}

void rows(nb::handle ids_, nb::handle packed_, int64_t n, int64_t k, const char* kind,
          nb::handle out_) {
  const Tensor ids(ids_, "ids"), packed(packed_, "packed"), out(out_, "out", true);
  const PackedLayout layout = layout_of(n, k, kind, 64);
  if (quantized(layout.kind)) value_error("kind must be bf16 or fp32: codes are not the weight");
  need_packed(packed, Slices(layout, {}));
  ids.need_ndim(1).need_contiguous();
  if (ids.dtype != DType::kI32 && ids.dtype != DType::kI64)
    value_error("ids: must be int32 or int64");
  out.need_dtype(layout.kind == PackedKind::kBf16 ? DType::kBf16 : DType::kF32);
  out.need_shape({ids.shape[0], k}).need_last_contiguous();
  const PackedRowsParams p{layout,   packed.data,        ids.data,    ids.dtype == DType::kI64,
                           out.data, out.byte_stride(0), ids.shape[0]};
  submit("look_up", {ids_, packed_, out_}, [p] { packed_rows(p); });
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
        nb::arg("columns").none(), nb::arg("group"), nb::arg("threads"), nb::arg("cuts"));
  m.def("packed_rows", &rows);
  m.def("crc32c", &checksum);
  m.def("crc32c_generic", &checksum_generic);
}

}  // namespace sps::bind
