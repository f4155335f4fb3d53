// Row kernels over float32 or bfloat16, computed in float32.
#pragma once

#include <cmath>
#include <cstring>

#include "kernels/bf16.h"
#include "kernels/kv_rows.h"
#include "sps/elementwise.h"

namespace sps {
namespace SPS_ISA_NS {

struct F32 {
  static constexpr int kBytes = 4;
  static Wide::reg load(const char* p, int64_t i) { return Wide::load(p + 4 * i); }
  static void store(char* p, int64_t i, Wide::reg x) { Wide::store(p + 4 * i, x); }
  static float get(const char* p, int64_t i) {
    float x;
    __builtin_memcpy(&x, p + 4 * i, 4);
    return x;
  }
  static void put(char* p, int64_t i, float x) { __builtin_memcpy(p + 4 * i, &x, 4); }
};

struct Bf16 {
  static constexpr int kBytes = 2;
  static Wide::reg load(const char* p, int64_t i) { return Wide::load_bf16(p + 2 * i); }
  static void store(char* p, int64_t i, Wide::reg x) { Wide::store_bf16(p + 2 * i, x); }
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

// Adds x to the residual (rounded to its dtype) and returns the sum of squares of the result; with
// no residual, of x.
template <class T>
static float add_and_square(const char* x, char* residual, int64_t dim) {
  constexpr int W = Wide::W;
  Wide::reg sum0 = Wide::zero(), sum1 = Wide::zero();
  const char* src = residual != nullptr ? residual : x;
  int64_t i = 0;
  if (residual != nullptr) {
    for (; i + W <= dim; i += W)
      T::store(residual, i, Wide::add(T::load(residual, i), T::load(x, i)));
    for (; i < dim; ++i) T::put(residual, i, T::get(residual, i) + T::get(x, i));
  }
  for (i = 0; i + 2 * W <= dim; i += 2 * W) {
    const Wide::reg a = T::load(src, i), b = T::load(src, i + W);
    sum0 = Wide::fma(a, a, sum0);
    sum1 = Wide::fma(b, b, sum1);
  }
  float sum = Wide::hsum(Wide::add(sum0, sum1));
  for (; i < dim; ++i) sum += T::get(src, i) * T::get(src, i);
  return sum;
}

template <class T, class WT>
static void rms_norm_rows(const RmsNormParams& p, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i)
    for (int64_t j = 0; j < p.m; ++j) {
      const char* x = p.x.data + i * p.x.stride_i + j * p.x.stride_j;
      char* out = p.out.data + i * p.out.stride_i + j * p.out.stride_j;
      char* residual = p.residual.data == nullptr
                           ? nullptr
                           : p.residual.data + i * p.residual.stride_i + j * p.residual.stride_j;
      const float sum = add_and_square<T>(x, residual, p.dim);
      const float scale = 1.0f / ::sqrtf(sum / static_cast<float>(p.dim) + p.eps);
      const char* src = residual != nullptr ? residual : x;
      const Wide::reg s = Wide::set1(scale);
      int64_t c = 0;
      for (; c + Wide::W <= p.dim; c += Wide::W)
        T::store(out, c, Wide::mul(Wide::mul(T::load(src, c), s), WT::load(p.weight, c)));
      for (; c < p.dim; ++c) T::put(out, c, T::get(src, c) * scale * WT::get(p.weight, c));
    }
}

static void rms_norm_range(const RmsNormParams& p, int64_t begin, int64_t end) {
  if (p.bf16)
    p.weight_bf16 ? rms_norm_rows<Bf16, Bf16>(p, begin, end)
                  : rms_norm_rows<Bf16, F32>(p, begin, end);
  else
    p.weight_bf16 ? rms_norm_rows<F32, Bf16>(p, begin, end)
                  : rms_norm_rows<F32, F32>(p, begin, end);
}

// x / (1 + e^-x). Below -87 the result is under 1e-36 in size, and is computed as at -87 so that
// the exponential stays finite.
static inline Wide::reg silu(Wide::reg x) {
  const Wide::reg y = Wide::mul(Wide::max(x, Wide::set1(-87.0f)), Wide::set1(-1.44269504f));
  return Wide::div(x, Wide::add(Wide::set1(1.0f), Wide::exp2(y)));
}

template <class T>
static void silu_mul_rows(const SiluMulParams& p, int64_t begin, int64_t end) {
  constexpr int W = Wide::W;
  for (int64_t r = begin; r < end; ++r) {
    const char* gate = p.gate + r * p.gate_stride;
    const char* up = p.up + r * p.up_stride;
    char* out = p.out + r * p.out_stride;
    int64_t i = 0;
    for (; i + W <= p.dim; i += W)
      T::store(out, i, Wide::mul(silu(T::load(gate, i)), T::load(up, i)));
    for (; i < p.dim; ++i) {
      const float x = T::get(gate, i);
      T::put(out, i, x / (1.0f + ::expf(x < -87.0f ? 87.0f : -x)) * T::get(up, i));
    }
  }
}

static void silu_mul_range(const SiluMulParams& p, int64_t begin, int64_t end) {
  if (p.bf16)
    silu_mul_rows<Bf16>(p, begin, end);
  else
    silu_mul_rows<F32>(p, begin, end);
}

// Rotates x [d] in place: pairs (i, i + rotary / 2), as Hugging Face's models have them.
template <class T>
static inline void rotate(char* x, const float* cos, const float* sin, int half) {
  int i = 0;
  for (; i + Wide::W <= half; i += Wide::W) {
    const Wide::reg a = T::load(x, i), b = T::load(x, half + i);
    const Wide::reg c = Wide::load(cos + i), s = Wide::load(sin + i);
    T::store(x, i, Wide::sub(Wide::mul(a, c), Wide::mul(b, s)));
    T::store(x, half + i, Wide::fma(b, c, Wide::mul(a, s)));
  }
  for (; i < half; ++i) {
    const float a = T::get(x, i), b = T::get(x, half + i);
    T::put(x, i, a * cos[i] - b * sin[i]);
    T::put(x, half + i, b * cos[i] + a * sin[i]);
  }
}

// Writes the row x [d] of T to a page.
template <class T>
static inline void write_kv_row(KvFormat format, const char* x, int d, char* row) {
  if (format == KvFormat::kNative) {
    std::memcpy(row, x, static_cast<size_t>(d) * T::kBytes);
    return;
  }
  float values[kMaxQuantizedDim];
  for (int i = 0; i < d; ++i) values[i] = T::get(x, i);
  if (format == KvFormat::kInt8)
    encode_int8(values, d, row);
  else
    encode_fp8(values, d, row);
}

template <class T>
static void rope_rows(const RopeParams& p, int64_t begin, int64_t end) {
  const int half = p.rotary / 2;
  for (int64_t t = begin; t < end; ++t) {
    const float* cos = p.cos_sin + p.positions[t] * p.cos_sin_stride;
    for (int h = 0; h < p.heads; ++h)
      rotate<T>(p.q.data + t * p.q.stride_i + h * p.q.stride_j, cos, cos + half, half);
    const bool write = p.k_pool != nullptr && p.slots[t] >= 0;
    for (int h = 0; h < p.kv_heads; ++h) {
      char* k = p.k.data + t * p.k.stride_i + h * p.k.stride_j;
      rotate<T>(k, cos, cos + half, half);
      if (!write) continue;
      const int64_t slot = p.slots[t], offset = p.offsets[t];
      write_kv_row<T>(p.format, k, p.d,
                      p.k_pool + slot * p.k_slot + h * p.k_head + offset * p.k_token);
      write_kv_row<T>(p.format, p.v + t * p.v_stride_i + h * p.v_stride_j, p.d,
                      p.v_pool + slot * p.v_slot + h * p.v_head + offset * p.v_token);
    }
  }
}

static void rope_range(const RopeParams& p, int64_t begin, int64_t end) {
  if (p.bf16)
    rope_rows<Bf16>(p, begin, end);
  else
    rope_rows<F32>(p, begin, end);
}

}  // namespace SPS_ISA_NS
}  // namespace sps
