// The register tiles of attention. Lanes are query rows: scores and outputs are kept transposed
// (keys or columns x rows), so that the softmax never reduces across lanes and keys are broadcast
// straight from the pages, unpacked.
#pragma once

#include "kernels/modes.h"
#include "kernels/attention_tiles.h"

namespace sps {
namespace SPS_ISA_NS {

#ifdef SPS_HAS_DPBF16
using Bf16Mode = ModeBf16;
#else
using Bf16Mode = ModeBf16AsF32;
#endif

// Registers of rows per block, and keys (columns) per register tile for each count of registers:
// 16 accumulators under AVX-512's 32 registers, 8 under 16.
#ifdef SPS_WIDE_REGISTERS
constexpr int kRowRegs = 4;
constexpr int kAccumulators = 16;
#else
constexpr int kRowRegs = 2;
constexpr int kAccumulators = 8;
#endif
constexpr int kRowBlock = kRowRegs * Wide::W;

constexpr int keys_per_micro(int regs) {
  return regs == 3 ? kAccumulators / 4 : kAccumulators / regs;
}

// Allowed positions of each row (lane) of a block.
struct RowBounds {
  const int32_t* lo;
  const int32_t* hi;
};

// Scores of KT keys against NV registers of rows: s[key][row], rows `stride` floats apart;
// raises the running maximum mx[row]. When `bounds` is given, forbidden scores become -inf. With
// kAhead, one cache line from `ahead` on is asked for at each step.
template <class M, class V, int NV, int KT, bool kAhead = false>
static inline void scores_micro(const float* q, int64_t stride, const char* k, int64_t k_stride,
                                int steps, int pos, const RowBounds* bounds, float* s,
                                float* mx, const char* ahead = nullptr) {
  typename V::reg acc[KT][NV];
#pragma GCC unroll 16
  for (int i = 0; i < KT; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) acc[i][v] = V::zero();
  for (int c = 0; c < steps; ++c) {
    if (kAhead) __builtin_prefetch(ahead + 64 * c, 0, 2);
    typename V::reg qv[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) qv[v] = V::load(q + c * stride + v * V::W);
#pragma GCC unroll 16
    for (int i = 0; i < KT; ++i) {
      const typename V::reg b = V::bcast(k + i * k_stride + 4 * c);
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) acc[i][v] = M::template dot<V>(b, qv[v], acc[i][v]);
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < NV; ++v) {
    if (bounds != nullptr) {
      const typename V::ireg lo = V::iload(bounds->lo + v * V::W);
      const typename V::ireg hi = V::iload(bounds->hi + v * V::W);
#pragma GCC unroll 16
      for (int i = 0; i < KT; ++i) acc[i][v] = V::keep_between(acc[i][v], pos + i, lo, hi);
    }
    typename V::reg m = V::load(mx + v * V::W);
#pragma GCC unroll 16
    for (int i = 0; i < KT; ++i) {
      m = V::max(m, acc[i][v]);
      V::store(s + i * stride + v * V::W, acc[i][v]);
    }
    V::store(mx + v * V::W, m);
  }
}

// One online-softmax step over `keys` (even) keys: s becomes probabilities in cells, in place;
// m (running maximum in log2 units), l (running sum) and alpha (what earlier output is worth now)
// are updated. mx holds the largest raw score of the block.
template <class M, class V, int NV>
static inline void softmax_step(float* s, int64_t stride, int keys, float scale_log2,
                                const float* mx, float* m, float* l, float* alpha) {
  const typename V::reg c = V::set1(scale_log2);
  for (int v = 0; v < NV; ++v) {
    const int at = v * V::W;
    const typename V::reg m_old = V::load(m + at);
    const typename V::reg m_new = V::max(m_old, V::mul(V::load(mx + at), c));
    // A row that has seen no key yet keeps -inf as its maximum and subtracts 0.
    const typename V::reg shift = V::sub(V::zero(), V::finite_or_zero(m_new));
    const typename V::reg a = V::exp2(V::add(m_old, shift));
    typename V::reg sum0 = V::zero(), sum1 = V::zero();
    float* col = s + at;
#pragma GCC unroll 2
    for (int j = 0; j < keys / 2; ++j) {
      const typename V::reg x0 = V::load(col + (2 * j) * stride);
      const typename V::reg x1 = V::load(col + (2 * j + 1) * stride);
      const typename V::reg e0 = V::exp2(V::fma(x0, c, shift));
      const typename V::reg e1 = V::exp2(V::fma(x1, c, shift));
      sum0 = V::add(sum0, e0);
      sum1 = V::add(sum1, e1);
      M::template store_pair<V>(col, stride, j, e0, e1);
    }
    V::store(l + at, V::fma(V::load(l + at), a, V::add(sum0, sum1)));
    V::store(m + at, m_new);
    V::store(alpha + at, a);
  }
}

// Adds the values of `n` tiles, weighted, to CT columns of the transposed output o[col][row].
template <class M, class V, int NV, int CT>
static inline void values_micro(const float* p, int64_t stride, const Tile* const* tiles, int n,
                                int col, const float* alpha, float* o) {
  typename V::reg acc[CT][NV];
#pragma GCC unroll 4
  for (int v = 0; v < NV; ++v) {
    const typename V::reg a = V::load(alpha + v * V::W);
#pragma GCC unroll 16
    for (int i = 0; i < CT; ++i)
      acc[i][v] = V::mul(V::load(o + (col + i) * stride + v * V::W), a);
  }
  for (int t = 0; t < n; ++t) {
    const char* vals = tiles[t]->v + 4 * col;
    const int64_t v_stride = tiles[t]->v_stride;
    for (int step = 0; step < kTile / M::kPerCell; ++step) {
      typename V::reg pv[NV];
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) pv[v] = V::load(p + v * V::W);
#pragma GCC unroll 16
      for (int i = 0; i < CT; ++i) {
        const typename V::reg b = V::bcast(vals + 4 * i);
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) acc[i][v] = M::template dot<V>(b, pv[v], acc[i][v]);
      }
      p += stride;
      vals += v_stride;
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < CT; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) V::store(o + (col + i) * stride + v * V::W, acc[i][v]);
}

}  // namespace SPS_ISA_NS
}  // namespace sps
