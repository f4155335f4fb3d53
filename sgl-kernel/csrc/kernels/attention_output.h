// Writing finished rows: normalise, merge with what is there, round to the output's dtype.
#pragma once

#include <cmath>
#include <cstdint>

#include "kernels/bf16.h"
#include "sps/attention.h"

namespace sps {
namespace SPS_ISA_NS {

static inline float load_out(const char* out, int i, bool bf16) {
  if (!bf16) {
    float x;
    __builtin_memcpy(&x, out + 4 * i, 4);
    return x;
  }
  uint16_t h;
  __builtin_memcpy(&h, out + 2 * i, 2);
  return bf16_to_float(h);
}

// out[i] = o[i] * w_new + (w_old == 0 ? 0 : out[i] * w_old)
static inline void store_row(char* out, bool bf16, const float* o, int d, float w_new,
                             float w_old) {
  for (int i = 0; i < d; ++i) {
    float x = o[i] * w_new;
    if (w_old != 0.0f) x += load_out(out, i, bf16) * w_old;
    if (bf16) {
      const uint16_t h = float_to_bf16(x);
      __builtin_memcpy(out + 2 * i, &h, 2);
    } else {
      __builtin_memcpy(out + 4 * i, &x, 4);
    }
  }
}

// Weights of two states under their merge, and its lse. Both empty: weights 0, lse -inf.
struct MergeWeights {
  float w_new, w_old, lse;
};

static inline MergeWeights merge_weights(float lse_new, float lse_old) {
  const float m = lse_new > lse_old ? lse_new : lse_old;
  if (m == -INFINITY) return {0.0f, 0.0f, m};
  const float a = ::expf(lse_new - m), b = ::expf(lse_old - m), sum = a + b;
  return {a / sum, b / sum, m + ::logf(sum)};
}

// Row `row` of a unit: o [d] times `norm` is its output.
static inline void write_row(const AttentionParams& p, const AttentionUnit& u, int row,
                             const float* o, float norm, float lse) {
  const int64_t token = u.q_begin + row / p.group;
  const int64_t head = static_cast<int64_t>(u.kv_head) * p.group + row % p.group;
  char* out = p.out + token * p.out_token_stride + head * p.out_head_stride;
  float* lse_at = p.lse + token * p.lse_token_stride + head * p.lse_head_stride;
  float w_old = 0.0f;
  if (p.accumulate) {
    const MergeWeights w = merge_weights(lse, *lse_at);
    norm *= w.w_new;
    w_old = w.w_old;
    lse = w.lse;
  }
  store_row(out, p.out_bf16, o, p.d, norm, w_old);
  *lse_at = lse;
}

// As write_row, from the online softmax's maximum (log2 units) and sum, or into a part's buffer.
static inline void finish_row(const AttentionParams& p, const AttentionUnit& u, int i,
                              const float* o, float m, float l) {
  const bool empty = l == 0.0f;
  const float norm = empty ? 0.0f : 1.0f / l;
  const float lse =
      empty ? -INFINITY : static_cast<float>(m * 0.69314718055994531 + ::log((double)l));
  if (u.part_o == nullptr) return write_row(p, u, u.row_begin + i, o, norm, lse);
  float* part = u.part_o + static_cast<int64_t>(i) * p.d;
  for (int c = 0; c < p.d; ++c) part[c] = o[c] * norm;
  u.part_lse[i] = lse;
}

// Merges the n parts of a unit's rows (o [n, rows, d], lse [n, rows]) and writes them.
static void write_merged(const AttentionParams& p, const AttentionUnit& u, const float* o,
                         const float* lse, int n) {
  const int64_t rows = u.row_count, d = p.d;
  float acc[kMaxHeadDim];
  for (int64_t r = 0; r < rows; ++r) {
    float m = -INFINITY, sum = 0.0f;
    for (int s = 0; s < n; ++s) m = lse[s * rows + r] > m ? lse[s * rows + r] : m;
    for (int64_t c = 0; c < d; ++c) acc[c] = 0.0f;
    for (int s = 0; s < n && m != -INFINITY; ++s) {
      const float w = ::expf(lse[s * rows + r] - m);
      sum += w;
      if (w == 0.0f) continue;
      const float* part = o + (s * rows + r) * d;
      for (int64_t c = 0; c < d; ++c) acc[c] += w * part[c];
    }
    const bool empty = sum == 0.0f;
    write_row(p, u, u.row_begin + static_cast<int>(r), acc, empty ? 0.0f : 1.0f / sum,
              empty ? -INFINITY : m + ::logf(sum));
  }
}

}  // namespace SPS_ISA_NS
}  // namespace sps
