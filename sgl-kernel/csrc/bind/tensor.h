// Arrays handed over by Python: CPU tensors through DLPack (its C exchange table where the
// framework has one, else __dlpack__) and anything with the buffer protocol. Zero copy.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstdint>
#include <string>
#include <vector>

#include "sps/kv_format.h"

namespace nb = nanobind;

namespace sps::bind {

enum class DType { kF32, kBf16, kI32, kU32, kI64, kU64, kU8, kOther };

const char* dtype_name(DType dtype);

class Tensor {
 public:
  static constexpr int kMaxDims = 6;

  // `name` is used in messages. Throws nb::value_error when the object cannot be read as a CPU
  // array, or cannot be written to and `writable` is asked for.
  Tensor(nb::handle object, const char* name, bool writable = false);
  ~Tensor();
  Tensor(Tensor&& other) noexcept;
  Tensor(const Tensor&) = delete;
  Tensor& operator=(const Tensor&) = delete;
  Tensor& operator=(Tensor&&) = delete;

  char* data = nullptr;
  int ndim = 0;
  DType dtype = DType::kOther;
  int64_t shape[kMaxDims] = {}, stride[kMaxDims] = {};  // stride in elements
  int64_t item = 4;                                     // bytes of an element
  std::string name;

  int64_t item_bytes() const { return item; }
  int64_t size() const;
  int64_t byte_stride(int dim) const { return stride[dim] * item_bytes(); }
  template <class T>
  T* as() const { return reinterpret_cast<T*>(data); }

  // Each throws nb::value_error, naming the array, when the condition does not hold.
  const Tensor& need_ndim(int n) const;
  const Tensor& need_dtype(DType a) const;
  const Tensor& need_float() const;  // float32 or bfloat16
  const Tensor& need_shape(std::initializer_list<int64_t> want) const;  // -1: anything
  const Tensor& need_last_contiguous() const;
  const Tensor& need_contiguous() const;

 private:
  bool from_exchange_api(nb::handle object);
  bool from_buffer(nb::handle object, bool writable);
  void from_dlpack(nb::handle object, bool writable);
  [[noreturn]] void fail(const std::string& what) const;

  Py_buffer buffer_{};
  bool has_buffer_ = false;
  nb::object owner_;
};

[[noreturn]] void value_error(const std::string& message);
int check_threads(int threads);
KvFormat kv_format_of(const std::string& name);  // "native", "int8", "fp8_e4m3"

// Tells a recording of this thread, if there is one, that a call is about to write `object`
// (bind/program.h).
void note_written(nb::handle object, const char* name);

}  // namespace sps::bind
