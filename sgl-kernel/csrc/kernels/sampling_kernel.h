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

}  // namespace SPS_ISA_NS
}  // namespace sps
