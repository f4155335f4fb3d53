// The n-way merge of one range of tokens.
#pragma once

#include <cmath>

#include "kernels/attention_output.h"
#include "sps/merge.h"

namespace sps {
namespace SPS_ISA_NS {

// Weights of the parts at one (token, head) and the merged lse. An empty part has weight 0, and is
// then never read: its output may be anything.
static inline float part_weights(const MergeParams& p, int64_t token, int head, float* w) {
  float m = -INFINITY, sum = 0.0f;
  for (int i = 0; i < p.n; ++i) {
    const StateView& s = p.parts[i];
    w[i] = s.lse[token * s.lse_token_stride + head * s.lse_head_stride];
    if (!(w[i] <= m)) m = w[i];  // a NaN is kept
  }
  const bool empty = m == -INFINITY;
  for (int i = 0; i < p.n; ++i) {
    w[i] = empty || w[i] == -INFINITY ? 0.0f : ::expf(w[i] - m);
    sum += w[i];
  }
  for (int i = 0; i < p.n && !empty; ++i) w[i] /= sum;
  return empty ? m : m + ::logf(sum);
}

static void merge_tokens(const MergeParams& p, int64_t begin, int64_t end) {
  float w[kMaxMergeParts], acc[kMaxHeadDim];
  for (int64_t t = begin; t < end; ++t)
    for (int h = 0; h < p.heads; ++h) {
      const float lse = part_weights(p, t, h, w);
      for (int c = 0; c < p.d; ++c) acc[c] = 0.0f;
      for (int i = 0; i < p.n; ++i) {
        if (w[i] == 0.0f) continue;
        const StateView& s = p.parts[i];
        const char* o = s.o + t * s.o_token_stride + h * s.o_head_stride;
        if (s.bf16)
          for (int c = 0; c < p.d; ++c) acc[c] += w[i] * load_out(o, c, true);
        else
          for (int c = 0; c < p.d; ++c) acc[c] += w[i] * load_out(o, c, false);
      }
      const StateView& out = p.out;
      store_row(out.o + t * out.o_token_stride + h * out.o_head_stride, out.bf16, acc, p.d, 1.0f,
                0.0f);
      out.lse[t * out.lse_token_stride + h * out.lse_head_stride] = lse;
    }
}

}  // namespace SPS_ISA_NS
}  // namespace sps
