#include "bind/tensor.h"

#include <cstring>

namespace sps::bind {
namespace {

// The stable part of DLPack 1.x (dlpack.h) that we read.
struct DlDevice {
  int32_t type, id;
};
struct DlDataType {
  uint8_t code, bits;
  uint16_t lanes;
};
struct DlTensor {
  void* data;
  DlDevice device;
  int32_t ndim;
  DlDataType dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};
struct DlExchangeApi {
  uint32_t major, minor;
  void* prev_api;
  void* managed_tensor_allocator;
  void* managed_tensor_from_py_object;
  void* managed_tensor_to_py_object;
  int (*dltensor_from_py_object)(void* object, DlTensor* out);
  void* current_work_stream;
};

constexpr int kDlCpu = 1;
enum DlCode { kDlInt = 0, kDlUInt = 1, kDlFloat = 2, kDlBfloat = 4 };

DType dtype_of(int code, int bits) {
  if (code == kDlFloat && bits == 32) return DType::kF32;
  if (code == kDlBfloat && bits == 16) return DType::kBf16;
  if (code == kDlInt && bits == 32) return DType::kI32;
  if (code == kDlUInt && bits == 32) return DType::kU32;
  if (code == kDlInt && bits == 64) return DType::kI64;
  if (code == kDlUInt && bits == 64) return DType::kU64;
  if (code == kDlUInt && bits == 8) return DType::kU8;
  return DType::kOther;
}

DType dtype_of_format(const char* format, int64_t bytes) {
  if (format == nullptr) return DType::kU8;
  if (*format == '@' || *format == '=' || *format == '<') ++format;
  if (std::strlen(format) != 1) return DType::kOther;
  const char c = *format;
  if (c == 'f') return DType::kF32;
  if (std::strchr("il", c) != nullptr && bytes == 4) return DType::kI32;
  if (std::strchr("IL", c) != nullptr && bytes == 4) return DType::kU32;
  if (std::strchr("lq", c) != nullptr && bytes == 8) return DType::kI64;
  if (std::strchr("LQ", c) != nullptr && bytes == 8) return DType::kU64;
  if (c == 'B' || c == 'c') return DType::kU8;
  return DType::kOther;
}

// The exchange table of a type, or null; the few types that are seen are remembered.
const DlExchangeApi* exchange_api(PyTypeObject* type) {
  struct Seen {
    PyTypeObject* type;
    const DlExchangeApi* api;
  };
  static Seen seen[8];
  static int count = 0;
  for (int i = 0; i < count; ++i)
    if (seen[i].type == type) return seen[i].api;
  const DlExchangeApi* api = nullptr;
  PyObject* capsule =
      PyObject_GetAttrString(reinterpret_cast<PyObject*>(type), "__dlpack_c_exchange_api__");
  if (capsule != nullptr && PyCapsule_IsValid(capsule, "dlpack_exchange_api"))
    api = static_cast<DlExchangeApi*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
  PyErr_Clear();
  Py_XDECREF(capsule);
  if (api != nullptr && (api->major != 1 || api->dltensor_from_py_object == nullptr))
    api = nullptr;
  if (count < 8) {
    Py_INCREF(type);  // a remembered type must not be freed and its address used again
    seen[count++] = {type, api};
  }
  return api;
}

std::string python_error() {
  nb::python_error error;
  return error.what();
}

}  // namespace

void value_error(const std::string& message) { throw nb::value_error(message.c_str()); }

KvFormat kv_format_of(const std::string& name) {
  if (name == "native") return KvFormat::kNative;
  if (name == "int8") return KvFormat::kInt8;
  if (name == "fp8_e4m3") return KvFormat::kFp8;
  value_error("format must be native, int8 or fp8_e4m3, not " + name);
}

int check_threads(int threads) {
  if (threads < 1 || threads > 1024) value_error("threads must be in [1, 1024]");
  return threads;
}

const char* dtype_name(DType dtype) {
  switch (dtype) {
    case DType::kF32: return "float32";
    case DType::kBf16: return "bfloat16";
    case DType::kI32: return "int32";
    case DType::kU32: return "uint32";
    case DType::kI64: return "int64";
    case DType::kU64: return "uint64";
    case DType::kU8: return "uint8";
    default: return "an unsupported dtype";
  }
}

Tensor::Tensor(nb::handle object, const char* name, bool writable) : name(name) {
  if (!from_exchange_api(object) && !from_buffer(object, writable))
    from_dlpack(object, writable);
  if (writable) note_written(object, name);
}

Tensor::~Tensor() {
  if (has_buffer_) PyBuffer_Release(&buffer_);
}

Tensor::Tensor(Tensor&& other) noexcept
    : data(other.data), ndim(other.ndim), dtype(other.dtype), item(other.item),
      name(std::move(other.name)), buffer_(other.buffer_), has_buffer_(other.has_buffer_), owner_(std::move(other.owner_)) {
  std::memcpy(shape, other.shape, sizeof shape);
  std::memcpy(stride, other.stride, sizeof stride);
  other.has_buffer_ = false;
}

bool Tensor::from_exchange_api(nb::handle object) {
  const DlExchangeApi* api = exchange_api(Py_TYPE(object.ptr()));
  if (api == nullptr) return false;
  DlTensor t;
  if (api->dltensor_from_py_object(object.ptr(), &t) != 0) fail(python_error());
  if (t.device.type != kDlCpu) fail("is not on the CPU");
  if (t.ndim > kMaxDims) fail("has too many dims");
  data = static_cast<char*>(t.data) + t.byte_offset;
  ndim = t.ndim;
  dtype = t.dtype.lanes == 1 ? dtype_of(t.dtype.code, t.dtype.bits) : DType::kOther;
  item = (t.dtype.bits * t.dtype.lanes + 7) / 8;
  int64_t next = 1;
  for (int i = ndim - 1; i >= 0; --i) {
    shape[i] = t.shape[i];
    stride[i] = t.strides != nullptr ? t.strides[i] : next;
    next *= shape[i];
  }
  return true;
}

bool Tensor::from_buffer(nb::handle object, bool writable) {
  if (!PyObject_CheckBuffer(object.ptr())) return false;
  const int flags = PyBUF_STRIDES | PyBUF_FORMAT | (writable ? PyBUF_WRITABLE : 0);
  if (PyObject_GetBuffer(object.ptr(), &buffer_, flags) != 0) fail(python_error());
  has_buffer_ = true;
  if (buffer_.ndim > kMaxDims) {
    PyBuffer_Release(&buffer_);
    fail("has too many dims");
  }
  data = static_cast<char*>(buffer_.buf);
  ndim = buffer_.ndim;
  dtype = dtype_of_format(buffer_.format, buffer_.itemsize);
  item = buffer_.itemsize;
  for (int i = 0; i < ndim; ++i) {
    shape[i] = buffer_.shape[i];
    stride[i] = buffer_.itemsize > 0 ? buffer_.strides[i] / buffer_.itemsize : 0;
    if (buffer_.strides[i] % buffer_.itemsize != 0) dtype = DType::kOther;
  }
  return true;
}

void Tensor::from_dlpack(nb::handle object, bool writable) {
  nb::ndarray<nb::ro> array;
  if (!nb::try_cast(object, array)) {
    PyErr_Clear();
    fail("is not an array (need a CPU tensor, a NumPy array or a buffer)");
  }
  (void)writable;  // frameworks that reach here have no read-only tensors
  if (array.device_type() != nb::device::cpu::value) fail("is not on the CPU");
  if (array.ndim() > static_cast<size_t>(kMaxDims)) fail("has too many dims");
  data = const_cast<char*>(static_cast<const char*>(array.data()));
  ndim = static_cast<int>(array.ndim());
  dtype = dtype_of(array.dtype().code, array.dtype().bits);
  item = (array.dtype().bits * array.dtype().lanes + 7) / 8;
  for (int i = 0; i < ndim; ++i) {
    shape[i] = static_cast<int64_t>(array.shape(i));
    stride[i] = array.stride(i);
  }
  owner_ = nb::cast(array);
}

int64_t Tensor::size() const {
  int64_t n = 1;
  for (int i = 0; i < ndim; ++i) n *= shape[i];
  return n;
}

void Tensor::fail(const std::string& what) const { value_error(name + ": " + what); }

const Tensor& Tensor::need_ndim(int n) const {
  if (ndim != n)
    fail("needs " + std::to_string(n) + " dims, has " + std::to_string(ndim));
  return *this;
}

const Tensor& Tensor::need_dtype(DType a) const {
  if (dtype != a)
    fail(std::string("must be ") + dtype_name(a) + ", is " + dtype_name(dtype));
  return *this;
}

const Tensor& Tensor::need_float() const {
  if (dtype != DType::kF32 && dtype != DType::kBf16)
    fail(std::string("must be float32 or bfloat16, is ") + dtype_name(dtype));
  return *this;
}

const Tensor& Tensor::need_shape(std::initializer_list<int64_t> want) const {
  need_ndim(static_cast<int>(want.size()));
  int i = 0;
  for (int64_t n : want) {
    if (n >= 0 && shape[i] != n)
      fail("dim " + std::to_string(i) + " must be " + std::to_string(n) + ", is " +
           std::to_string(shape[i]));
    ++i;
  }
  return *this;
}

const Tensor& Tensor::need_last_contiguous() const {
  if (ndim < 1 || (stride[ndim - 1] != 1 && shape[ndim - 1] > 1))
    fail("the last dim must be contiguous");
  return *this;
}

const Tensor& Tensor::need_contiguous() const {
  int64_t next = 1;
  for (int i = ndim - 1; i >= 0; --i) {
    if (shape[i] > 1 && stride[i] != next && size() > 0) fail("must be contiguous");
    next *= shape[i];
  }
  return *this;
}

}  // namespace sps::bind
