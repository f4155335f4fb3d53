// Python's view of the fence words.
#include <cmath>

#include "bind/module.h"
#include "bind/program.h"
#include "sps/fence.h"

namespace sps::bind {
namespace {

struct Word {
  Tensor tensor;
  char* at;
  int bytes;

  Word(nb::handle buffer, int64_t index, bool writable)
      : tensor((refuse_recording("a fence"), buffer), "buffer", writable),
        at(nullptr),
        bytes(static_cast<int>(item())) {
    tensor.need_ndim(1).need_contiguous();
    if (index < 0 || index >= tensor.shape[0]) value_error("index lies outside the buffer");
    at = tensor.data + index * bytes;
    if (reinterpret_cast<uintptr_t>(at) % bytes != 0) value_error("the word is not aligned");
  }

  uint64_t check(int64_t value) const {
    const int64_t most = is_signed() ? int64_t{INT32_MAX} : int64_t{UINT32_MAX};
    const bool fits = bytes == 8 || value <= most;
    if (value < 0 || !fits) value_error("value does not fit the word");
    return static_cast<uint64_t>(value);
  }

 private:
  bool is_signed() const { return tensor.dtype == DType::kI32; }

  int64_t item() const {
    switch (tensor.dtype) {
      case DType::kI32:
      case DType::kU32:
      case DType::kI64:
      case DType::kU64: return tensor.item_bytes();
      default: value_error("buffer: must be of int32, uint32, int64 or uint64");
    }
  }
};

bool wait(nb::handle buffer, int64_t index, int64_t value, double spin_us, double timeout_s) {
  const Word w(buffer, index, false);
  const uint64_t v = w.check(value);
  if (std::isnan(spin_us) || std::isnan(timeout_s)) value_error("spin_us and timeout_s: not NaN");
  bool ok;
  {
    nb::gil_scoped_release release;
    ok = wait_at_least(w.at, w.bytes, v, spin_us, timeout_s, &signal_pending);
  }
  if (PyErr_Occurred()) throw nb::python_error();
  return ok;
}

}  // namespace

void bind_fence(nb::module_& m) {
  m.def("store_release", [](nb::handle b, int64_t i, int64_t value) {
    const Word w(b, i, true);
    store_release(w.at, w.bytes, w.check(value));
  });
  m.def("load_acquire", [](nb::handle b, int64_t i) {
    const Word w(b, i, false);
    return load_acquire(w.at, w.bytes);
  });
  m.def("fetch_max", [](nb::handle b, int64_t i, int64_t value) {
    const Word w(b, i, true);
    return fetch_max(w.at, w.bytes, w.check(value));
  });
  m.def("fetch_add", [](nb::handle b, int64_t i, int64_t value) {
    const Word w(b, i, true);
    return fetch_add(w.at, w.bytes, w.check(value));
  });
  m.def("publish", [](nb::handle b, int64_t i, int64_t value) {
    const Word w(b, i, true);
    store_release(w.at, w.bytes, w.check(value));
    wake_all(w.at, w.bytes);
  });
  m.def("wait_at_least", &wait);
  m.def("wake", [](nb::handle b, int64_t i) {
    const Word w(b, i, true);
    wake_all(w.at, w.bytes);
  });
}

}  // namespace sps::bind
