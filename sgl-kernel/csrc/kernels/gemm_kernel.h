// Dot products of weight rows with a few rows of x. Weights are loaded once for up to 4 (or 8) rows
// of x; what is loaded again for further rows comes from the cache.
#pragma once

#include "kernels/attention_decode.h"
#include "kernels/bf16.h"
#include "sps/gemm.h"

namespace sps {
namespace SPS_ISA_NS {

// One register of consecutive elements: floats, or bfloat16 as cells or converted.
struct RegF32 {
  static constexpr int kElems = Wide::W;
  static constexpr int kElemBytes = 4;
  static Wide::reg load(const char* p) { return Wide::load(p); }
  static Wide::reg dot(Wide::reg a, Wide::reg b, Wide::reg acc) { return Wide::fma(a, b, acc); }
  static float scalar(const char* p) {
    float x;
    __builtin_memcpy(&x, p, 4);
    return x;
  }
};

struct RegBf16AsF32 : RegF32 {
  static constexpr int kElemBytes = 2;
  static Wide::reg load(const char* p) { return Wide::load_bf16(p); }
  static float scalar(const char* p) {
    uint16_t h;
    __builtin_memcpy(&h, p, 2);
    return bf16_to_float(h);
  }
};

#ifdef SPS_HAS_DPBF16
struct RegBf16 : RegBf16AsF32 {
  static constexpr int kElems = 2 * Wide::W;
  static Wide::reg load(const char* p) { return Wide::load(p); }
  static Wide::reg dot(Wide::reg a, Wide::reg b, Wide::reg acc) {
    return ModeBf16::dot<Wide>(a, b, acc);
  }
};
using GemmBf16 = RegBf16;
#else
using GemmBf16 = RegBf16AsF32;
#endif

static inline float bias_at(const SmallGemmParams& p, int64_t n) {
  if (p.bias == nullptr) return 0.0f;
  return p.bias_bf16 ? RegBf16AsF32::scalar(p.bias + 2 * n) : RegF32::scalar(p.bias + 4 * n);
}

static inline void store_y(const SmallGemmParams& p, int64_t m, int64_t n, float y) {
  char* at = p.y + m * p.y_stride;
  if (p.y_bf16) {
    const uint16_t h = float_to_bf16(y);
    __builtin_memcpy(at + 2 * n, &h, 2);
  } else {
    __builtin_memcpy(at + 4 * n, &y, 4);
  }
}

// Elements of x and w that a tile multiplies before it moves on: 8 rows of x stay in the
// first-level cache. A few rows need no cutting.
constexpr int64_t kGemmChunk = 1024;
constexpr int kGemmBlockRows = 32;  // weight rows whose sums are kept
constexpr int kGemmPanel = 64;      // rows of x whose sums are kept

// Sums of one block: part[n - n0][m - m0].
struct GemmBlock {
  int64_t n0, n1, m0, m1, k0, k1;
  float* part;
};

// NT weight rows from n times MT rows of x from m. The weights one tile further on are asked for
// meanwhile: a tile's rows are too short for the hardware's prefetchers to run ahead of them.
template <class R, int NT, int MT>
static void gemm_tile(const SmallGemmParams& p, const GemmBlock& b, int64_t n, int64_t m) {
  static_assert(NT * MT <= 16, "hsum16 takes 16");
  Wide::reg acc[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) acc[i] = Wide::zero();
  const char* w = p.w + n * p.w_stride;
  const char* x = p.x + m * p.x_stride;
  const int64_t ahead = NT * p.w_stride;
  int64_t k = b.k0;
  for (; k + R::kElems <= b.k1; k += R::kElems) {
    const int64_t at = k * R::kElemBytes;
    Wide::reg wv[NT];
#pragma GCC unroll 4
    for (int i = 0; i < NT; ++i) {
      wv[i] = R::load(w + i * p.w_stride + at);
      __builtin_prefetch(w + i * p.w_stride + at + ahead, 0, 2);
    }
#pragma GCC unroll 8
    for (int j = 0; j < MT; ++j) {
      const Wide::reg xv = R::load(x + j * p.x_stride + at);
#pragma GCC unroll 4
      for (int i = 0; i < NT; ++i) acc[j * NT + i] = R::dot(wv[i], xv, acc[j * NT + i]);
    }
  }
  alignas(64) float sums[16];
  Wide::hsum16(acc, sums);
  for (int j = 0; j < MT; ++j)
    for (int i = 0; i < NT; ++i) {
      float y = sums[j * NT + i];
      for (int64_t c = k; c < b.k1; ++c)
        y += R::scalar(w + i * p.w_stride + c * R::kElemBytes) *
             R::scalar(x + j * p.x_stride + c * R::kElemBytes);
      float* part = b.part + (n + i - b.n0) * kGemmPanel + (m + j - b.m0);
      *part = b.k0 == 0 ? y : *part + y;
    }
}

// NT weight rows times all rows of the block.
template <class R, int NT>
static void gemm_rows(const SmallGemmParams& p, const GemmBlock& b, int64_t n) {
  constexpr int kMost = NT == 4 ? 4 : 8;
  int64_t m = b.m0;
  for (; m + kMost <= b.m1; m += kMost) gemm_tile<R, NT, kMost>(p, b, n, m);
  switch (b.m1 - m) {
    case 1: return gemm_tile<R, NT, 1>(p, b, n, m);
    case 2: return gemm_tile<R, NT, 2>(p, b, n, m);
    case 3: return gemm_tile<R, NT, 3>(p, b, n, m);
    default: break;
  }
  if constexpr (NT < 4) {
    switch (b.m1 - m) {
      case 4: return gemm_tile<R, NT, 4>(p, b, n, m);
      case 5: return gemm_tile<R, NT, 5>(p, b, n, m);
      case 6: return gemm_tile<R, NT, 6>(p, b, n, m);
      case 7: return gemm_tile<R, NT, 7>(p, b, n, m);
      default: break;
    }
  }
}

template <class R>
static void gemm_block(const SmallGemmParams& p, GemmBlock& b) {
  const bool few = b.m1 - b.m0 <= 4;
  const int64_t chunk = few || p.k == 0 ? p.k : kGemmChunk;
  b.k0 = 0;
  do {
    b.k1 = b.k0 + chunk < p.k ? b.k0 + chunk : p.k;
    int64_t n = b.n0;
    if (few)
      for (; n + 4 <= b.n1; n += 4) gemm_rows<R, 4>(p, b, n);
    else
      for (; n + 2 <= b.n1; n += 2) gemm_rows<R, 2>(p, b, n);
    for (; n < b.n1; ++n) gemm_rows<R, 1>(p, b, n);
    b.k0 = b.k1;
  } while (b.k0 < p.k);
  for (int64_t m = b.m0; m < b.m1; ++m)
    for (int64_t n = b.n0; n < b.n1; ++n)
      store_y(p, m, n, b.part[(n - b.n0) * kGemmPanel + (m - b.m0)] + bias_at(p, n));
}

template <class R>
static void gemm_range(const SmallGemmParams& p, int64_t begin, int64_t end) {
  alignas(64) float part[kGemmBlockRows * kGemmPanel];
  for (int64_t m = 0; m < p.m; m += kGemmPanel)
    for (int64_t n = begin; n < end; n += kGemmBlockRows) {
      const int64_t n1 = n + kGemmBlockRows < end ? n + kGemmBlockRows : end;
      const int64_t m1 = m + kGemmPanel < p.m ? m + kGemmPanel : p.m;
      GemmBlock b{n, n1, m, m1, 0, 0, part};
      gemm_block<R>(p, b);
    }
}

static void small_gemm_range(const SmallGemmParams& p, int64_t begin, int64_t end) {
  if (p.bf16)
    gemm_range<GemmBf16>(p, begin, end);
  else
    gemm_range<RegF32>(p, begin, end);
}

}  // namespace SPS_ISA_NS
}  // namespace sps
