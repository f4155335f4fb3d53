// The vectorised passes of sampling.
#pragma once

#include "kernels/elementwise_kernel.h"

namespace sps {
namespace SPS_ISA_NS {

// dst[i] = src[i] as float, NaN as -inf; returns the largest.
static float load_logits(const char* src, bool bf16, int64_t n, float* dst) {
  const Wide::reg low = Wide::set1(-INFINITY);
  Wide::reg best = low;
  int64_t i = 0;
  for (; i + Wide::W <= n; i += Wide::W) {
    // max(NaN, y) is y: the second operand.
    const Wide::reg x = Wide::max(bf16 ? Bf16::load(src, i) : F32::load(src, i), low);
    Wide::store(dst + i, x);
    best = Wide::max(best, x);
  }
  float most = Wide::hmax(best);
  for (; i < n; ++i) {
    const float x = bf16 ? Bf16::get(src, i) : F32::get(src, i);
    dst[i] = x > -INFINITY ? x : -INFINITY;
    most = dst[i] > most ? dst[i] : most;
  }
  return most;
}

// p[i] = exp((x[i] - shift) * scale), x[i] <= shift finite.
static void exp_weights(const float* x, int64_t n, float shift, float scale, float* p) {
  const Wide::reg s = Wide::set1(-shift), c = Wide::set1(scale * 1.44269504f);
  int64_t i = 0;
  for (; i + Wide::W <= n; i += Wide::W)
    Wide::store(p + i, Wide::exp2(Wide::mul(Wide::add(Wide::load(x + i), s), c)));
  for (; i < n; ++i) p[i] = ::expf((x[i] - shift) * scale);
}

// Where the first NaN is, or else the first largest value.
static int64_t largest_slowly(const float* x, int64_t n) {
  int64_t best = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (x[i] != x[i]) return i;
    if (x[i] > x[best]) best = i;
  }
  return best;
}

// As above, n >= 1. Blocks are looked through for the largest value alone; where it lies is sought
// in its block. 0 x is NaN for what the comparison would pass over, and for infinities.
static int64_t largest_index(const float* x, int64_t n) {
  constexpr int64_t kBlock = 64 * Wide::W;
  Wide::reg odd = Wide::zero();
  float most = -INFINITY;
  int64_t where = 0;
  for (int64_t begin = 0; begin + Wide::W <= n; begin += kBlock) {
    Wide::reg best = Wide::set1(-INFINITY);
    for (int64_t i = begin; i + Wide::W <= n && i < begin + kBlock; i += Wide::W) {
      const Wide::reg v = Wide::load(x + i);
      best = Wide::max(v, best);
      odd = Wide::fma(v, Wide::zero(), odd);
    }
    const float of_block = Wide::hmax(best);
    if (of_block > most) most = of_block, where = begin;
  }
  float odd_one = Wide::hsum(odd);
  for (int64_t i = n - n % Wide::W; i < n; ++i) {
    odd_one += 0.0f * x[i];
    if (x[i] > most) most = x[i], where = i;
  }
  if (odd_one != odd_one) return largest_slowly(x, n);
  while (x[where] != most) ++where;
  return where;
}

}  // namespace SPS_ISA_NS
}  // namespace sps
