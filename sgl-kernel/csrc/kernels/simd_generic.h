// Vectors of 8 floats in plain C++: correct everywhere, as fast as the compiler makes it.
#pragma once

#include <cmath>
#include <cstdint>

#include "kernels/bf16.h"
#include "kernels/fp8.h"

namespace sps {
namespace SPS_ISA_NS {

struct V8 {
  static constexpr int W = 8;
  struct reg {
    float v[8];
  };
  struct ireg {
    int32_t v[8];
  };

  template <class F>
  static reg each(F f) {
    reg r;
    for (int i = 0; i < 8; ++i) r.v[i] = f(i);
    return r;
  }
  static reg zero() { return set1(0.0f); }
  static reg set1(float x) {
    return each([&](int) { return x; });
  }
  static reg load(const void* p) {
    reg r;
    __builtin_memcpy(&r, p, sizeof r);
    return r;
  }
  static void store(void* p, const reg& x) { __builtin_memcpy(p, &x, sizeof x); }
  static ireg iload(const int32_t* p) {
    ireg r;
    __builtin_memcpy(&r, p, sizeof r);
    return r;
  }
  static reg add(const reg& a, const reg& b) {
    return each([&](int i) { return a.v[i] + b.v[i]; });
  }
  static reg sub(const reg& a, const reg& b) {
    return each([&](int i) { return a.v[i] - b.v[i]; });
  }
  static reg mul(const reg& a, const reg& b) {
    return each([&](int i) { return a.v[i] * b.v[i]; });
  }
  static reg fma(const reg& a, const reg& b, const reg& c) {
    return each([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
  }
  static reg max(const reg& a, const reg& b) {
    return each([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
  }
  static float hsum(const reg& a) {
    float s = 0.0f;
    for (int i = 0; i < 8; ++i) s += a.v[i];
    return s;
  }
  static float hmax(const reg& a) {
    float m = a.v[0];
    for (int i = 1; i < 8; ++i) m = a.v[i] > m ? a.v[i] : m;
    return m;
  }
  static reg bcast(const void* p) {
    float x;
    __builtin_memcpy(&x, p, 4);
    return set1(x);
  }
  static reg exp2(const reg& x) {
    return each([&](int i) { return ::exp2f(x.v[i]); });
  }
  static reg keep_between(const reg& x, int pos, const ireg& lo, const ireg& hi) {
    return each([&](int i) {
      return lo.v[i] <= pos && pos <= hi.v[i] ? x.v[i] : -__builtin_inff();
    });
  }
  static reg finite_or_zero(const reg& x) {
    return each([&](int i) { return x.v[i] == -__builtin_inff() ? 0.0f : x.v[i]; });
  }
  static reg div(const reg& a, const reg& b) {
    return each([&](int i) { return a.v[i] / b.v[i]; });
  }
  static reg load_bf16(const void* p) {
    uint16_t h[8];
    __builtin_memcpy(h, p, sizeof h);
    return each([&](int i) { return bf16_to_float(h[i]); });
  }
  // Rounds to nearest even.
  static void store_bf16(void* p, const reg& x) {
    uint16_t h[8];
    for (int i = 0; i < 8; ++i) h[i] = float_to_bf16(x.v[i]);
    __builtin_memcpy(p, h, sizeof h);
  }
  // The lower, and the upper, bfloat16 of each 32-bit lane.
  static reg even_bf16(const reg& x) {
    return each([&](int i) {
      uint32_t bits;
      __builtin_memcpy(&bits, &x.v[i], 4);
      return bf16_to_float(static_cast<uint16_t>(bits));
    });
  }
  static reg odd_bf16(const reg& x) {
    return each([&](int i) {
      uint32_t bits;
      __builtin_memcpy(&bits, &x.v[i], 4);
      return bf16_to_float(static_cast<uint16_t>(bits >> 16));
    });
  }
  static reg load_i8(const void* p) {
    const int8_t* x = static_cast<const int8_t*>(p);
    return each([&](int i) { return static_cast<float>(x[i]); });
  }
  static reg load_fp8(const void* p) {
    const uint8_t* x = static_cast<const uint8_t*>(p);
    return each([&](int i) { return fp8_to_float(x[i]); });
  }
  // out[i] = sum of the lanes of r[i], for 16 registers.
  static void hsum16(const reg* r, float* out) {
    for (int i = 0; i < 16; ++i) out[i] = hsum(r[i]);
  }
};

using Wide = V8;
using Narrow = V8;

// dst[c][r] = src[r][c] of an 8 x 8 block; strides in floats.
static inline void transpose8x8(const float* src, int64_t src_stride, float* dst,
                                int64_t dst_stride) {
  for (int r = 0; r < 8; ++r)
    for (int c = 0; c < 8; ++c) dst[c * dst_stride + r] = src[r * src_stride + c];
}

}  // namespace SPS_ISA_NS
}  // namespace sps
