#include "sps/moves.h"

#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>

#include "kernels/bf16.h"

namespace sps {
namespace {

struct F32 {
  static constexpr int kBytes = 4;
  static float get(const char* p, int64_t i) {
    float x;
    __builtin_memcpy(&x, p + 4 * i, 4);
    return x;
  }
  static void put(char* p, int64_t i, float x) { __builtin_memcpy(p + 4 * i, &x, 4); }
};

struct Bf16 {
  static constexpr int kBytes = 2;
  static float get(const char* p, int64_t i) {
    uint16_t h;
    __builtin_memcpy(&h, p + 2 * i, 2);
    return bf16_to_float(h);
  }
  static void put(char* p, int64_t i, float x) {
    const uint16_t h = float_to_bf16(x);
    __builtin_memcpy(p + 2 * i, &h, 2);
  }
};

template <class Src, class Dst>
void convert(const CopyParams& p) {
  for (int64_t i = 0; i < p.n; ++i)
    for (int64_t j = 0; j < p.m; ++j) {
      const char* src = p.src + i * p.src_i + j * p.src_j;
      char* dst = p.dst + i * p.dst_i + j * p.dst_j;
      for (int64_t c = 0; c < p.dim; ++c) Dst::put(dst, c, Src::get(src, c));
    }
}

template <class T>
void accumulate(const CopyParams& p) {
  for (int64_t i = 0; i < p.n; ++i)
    for (int64_t j = 0; j < p.m; ++j) {
      const char* src = p.src + i * p.src_i + j * p.src_j;
      char* dst = p.dst + i * p.dst_i + j * p.dst_j;
      for (int64_t c = 0; c < p.dim; ++c) T::put(dst, c, T::get(dst, c) + T::get(src, c));
    }
}

int64_t integer(const char* p, bool wide, int64_t i) {
  if (wide) {
    int64_t x;
    __builtin_memcpy(&x, p + 8 * i, 8);
    return x;
  }
  int32_t x;
  __builtin_memcpy(&x, p + 4 * i, 4);
  return x;
}

template <class T>
void sum_in_order(const SumParams& p) {
  constexpr int64_t kBlock = 512;
  float sum[kBlock];
  for (int64_t begin = 0; begin < p.n; begin += kBlock) {
    const int64_t count = p.n - begin < kBlock ? p.n - begin : kBlock;
    for (int64_t c = 0; c < count; ++c) sum[c] = T::get(p.parts, begin + c);
    for (int64_t k = 1; k < p.count; ++k) {
      const char* part = p.parts + k * p.part_stride;
      for (int64_t c = 0; c < count; ++c) sum[c] += T::get(part, begin + c);
    }
    for (int64_t c = 0; c < count; ++c) T::put(p.out, begin + c, sum[c]);
  }
}

}  // namespace

void copy(const CopyParams& p) {
  if (p.src_bf16 != p.dst_bf16) return p.src_bf16 ? convert<Bf16, F32>(p) : convert<F32, Bf16>(p);
  const size_t bytes = static_cast<size_t>(p.dim) * (p.src_bf16 ? 2 : 4);
  for (int64_t i = 0; i < p.n; ++i)
    for (int64_t j = 0; j < p.m; ++j)
      std::memcpy(p.dst + i * p.dst_i + j * p.dst_j, p.src + i * p.src_i + j * p.src_j, bytes);
}

void add(const CopyParams& p) { p.dst_bf16 ? accumulate<Bf16>(p) : accumulate<F32>(p); }

void look_up(const LookUpParams& p) {
  for (int64_t i = 0; i < p.n; ++i) {
    const int64_t id = integer(p.ids, p.ids64, i);
    if (id < 0 || id >= p.rows)
      throw std::invalid_argument("ids[" + std::to_string(i) + "] = " + std::to_string(id) +
                                  " lies outside [0, " + std::to_string(p.rows) + ")");
    std::memcpy(p.out + i * p.out_stride, p.table + id * p.table_stride,
                static_cast<size_t>(p.row_bytes));
  }
}

void sum_parts(const SumParams& p) { p.bf16 ? sum_in_order<Bf16>(p) : sum_in_order<F32>(p); }

void rope_angles(const AngleParams& p) {
  for (int64_t t = 0; t < p.n; ++t) {
    const float position = static_cast<float>(integer(p.positions, p.positions64, t));
    float* out = p.out + t * p.out_stride;
    for (int64_t f = 0; f < p.dim; ++f) {
      const float angle = position * p.frequencies[f];
      out[f] = ::cosf(angle) * p.scale;
      out[p.dim + f] = ::sinf(angle) * p.scale;
    }
  }
}

}  // namespace sps
