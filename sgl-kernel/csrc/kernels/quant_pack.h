// Rounding weights to codes and scales, the 16 outputs of a panel at a time.
#pragma once

#include "kernels/quant_format.h"

namespace sps {
namespace SPS_ISA_NS {

constexpr int kLanes = kPanelOutputs;

// One group of one panel: weights [columns][16], their largest magnitudes, scales and codes.
struct QuantGroup {
  alignas(64) float w[kQuantMaxGroup][kLanes];
  alignas(64) float most[kLanes], scale[kLanes];
  int8_t code[kQuantMaxGroup][kLanes];
  int columns;
};

static void quant_load(const PackParams& p, int64_t n0, int64_t k0, QuantGroup& g) {
  const int64_t rows = p.layout.n - n0 < kLanes ? p.layout.n - n0 : kLanes;
  for (int r = 0; r < kLanes; ++r)
    for (int c = 0; c < g.columns; ++c) {
      if (r >= rows) {
        g.w[c][r] = 0.0f;
        continue;
      }
      const char* at = p.weight + (n0 + r) * p.weight_stride + (k0 + c) * (p.weight_bf16 ? 2 : 4);
      uint16_t h;
      if (p.weight_bf16) {
        __builtin_memcpy(&h, at, 2);
        g.w[c][r] = bf16_to_float(h);
      } else {
        __builtin_memcpy(&g.w[c][r], at, 4);
      }
    }
  for (int l = 0; l < kLanes; ++l) g.most[l] = 0.0f;
  for (int c = 0; c < g.columns; ++c)
    for (int l = 0; l < kLanes; ++l) {
      const float magnitude = __builtin_fabsf(g.w[c][l]);
      g.most[l] = magnitude > g.most[l] ? magnitude : g.most[l];
    }
}

// The least bfloat16 that is not below x >= 0.
static inline float bf16_above(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  return bf16_to_float(static_cast<uint16_t>((bits + 0xffffu) >> 16));
}

static inline float inverse_scale(float scale) { return scale == 0.0f ? 0.0f : 1.0f / scale; }

// Below this a group is taken for 0: its scale would have no inverse.
constexpr float kQuantLeast = 1e-35f;

static void round_int8(QuantGroup& g) {
  alignas(64) float inverse[kLanes];
  for (int l = 0; l < kLanes; ++l) {
    g.scale[l] = g.most[l] < kQuantLeast ? 0.0f : bf16_above(g.most[l] / 127.0f);
    inverse[l] = inverse_scale(g.scale[l]);
  }
  for (int c = 0; c < g.columns; ++c)
    for (int l = 0; l < kLanes; ++l) {
      const float t = g.w[c][l] * inverse[l];
      const float bounded = t > 127.0f ? 127.0f : t < -127.0f ? -127.0f : t;
      g.code[c][l] = static_cast<int8_t>(__builtin_rintf(bounded));
    }
}

// Under each output's scale: the squared error when every weight takes its nearest value, and the
// sums whose quotient is the best scale for those values.
struct Int4Fit {
  alignas(64) float error[kLanes], weight_value[kLanes], value_value[kLanes];
};

// Arithmetic on the 16 outputs; the compiler splits it where registers are narrower.
typedef float Lanes __attribute__((vector_size(4 * kLanes)));

static void int4_fit(const QuantGroup& g, const float* scale, Int4Fit& fit) {
  Lanes scales, inverse, zero = {}, error = {}, weight_value = {}, value_value = {};
  __builtin_memcpy(&scales, scale, sizeof scales);
  for (int l = 0; l < kLanes; ++l) inverse[l] = inverse_scale(scale[l]);
  for (int c = 0; c < g.columns; ++c) {
    Lanes w, value = zero + kInt4Values[0];
    __builtin_memcpy(&w, g.w[c], sizeof w);
    const Lanes t = w * inverse;
#pragma GCC unroll 16
    for (int j = 1; j < kInt4Levels; ++j) {
      const float middle = 0.5f * (kInt4Values[j] + kInt4Values[j - 1]);
      const float gap = kInt4Values[j] - kInt4Values[j - 1];
      value += t > middle ? zero + gap : zero;
    }
    const Lanes off = w - scales * value;
    error += off * off;
    weight_value += w * value;
    value_value += value * value;
  }
  __builtin_memcpy(fit.error, &error, sizeof error);
  __builtin_memcpy(fit.weight_value, &weight_value, sizeof weight_value);
  __builtin_memcpy(fit.value_value, &value_value, sizeof value_value);
}

// Takes `scale` where its error is less than the best so far.
static void int4_try(const QuantGroup& g, const float* scale, float* best, Int4Fit& best_fit) {
  Int4Fit fit;
  int4_fit(g, scale, fit);
  for (int l = 0; l < kLanes; ++l)
    if (fit.error[l] < best_fit.error[l]) {
      best[l] = scale[l];
      best_fit.error[l] = fit.error[l];
      best_fit.weight_value[l] = fit.weight_value[l];
      best_fit.value_value[l] = fit.value_value[l];
    }
}

constexpr int kInt4Steps = 8;

// The scale of least squared error on a grid around what reaches the largest weight, in both signs
// (the values are not symmetric), then twice the least-squares scale for the values chosen.
static void round_int4(QuantGroup& g) {
  alignas(64) float scale[kLanes];
  Int4Fit best;
  for (int l = 0; l < kLanes; ++l) {
    const float reach = g.most[l] < kQuantLeast ? 0.0f : g.most[l] / 127.0f;
    g.scale[l] = bf16_to_float(float_to_bf16(reach));
  }
  int4_fit(g, g.scale, best);
  for (int i = 0; i < 2 * kInt4Steps; ++i) {
    const float factor = (i % 2 == 0 ? 1.0f : -1.0f) * (0.76f + 0.06f * (i / 2));
    for (int l = 0; l < kLanes; ++l)
      scale[l] = g.most[l] < kQuantLeast
                     ? 0.0f
                     : bf16_to_float(float_to_bf16(factor * g.most[l] / 127.0f));
    int4_try(g, scale, g.scale, best);
  }
  for (int i = 0; i < 2; ++i) {
    for (int l = 0; l < kLanes; ++l) {
      const float fitted = best.weight_value[l] / best.value_value[l];
      const bool usable = __builtin_fabsf(fitted) > kQuantLeast / 127.0f;
      scale[l] = usable ? bf16_to_float(float_to_bf16(fitted)) : g.scale[l];
    }
    int4_try(g, scale, g.scale, best);
  }
  for (int c = 0; c < g.columns; ++c)
    for (int l = 0; l < kLanes; ++l) {
      const float t = g.w[c][l] * inverse_scale(g.scale[l]);
      int code = 0;
      for (int j = 1; j < kInt4Levels; ++j)
        code += t > 0.5f * (kInt4Values[j] + kInt4Values[j - 1]);
      g.code[c][l] = static_cast<int8_t>(code);
    }
}

static void quant_write(PackedKind kind, const QuantGroup& g, char* codes, char* scales) {
  for (int b = 0; b * kQuantBlock < g.columns; ++b) {
    char* block = codes + b * quant_block_bytes(kind);
    uint32_t nibbles[kLanes] = {};
    for (int i = 0; i < kQuantBlock; ++i) {
      const int c = b * kQuantBlock + i;
      for (int l = 0; l < kLanes; ++l) {
        const int8_t code = c < g.columns ? g.code[c][l] : 0;
        if (kind == PackedKind::kInt8)
          __builtin_memcpy(block + int8_offset(i, l), &code, 1);
        else
          nibbles[l] |= static_cast<uint32_t>(code) << int4_shift(i);
      }
    }
    if (kind == PackedKind::kInt4) __builtin_memcpy(block, nibbles, sizeof nibbles);
  }
  for (int l = 0; l < kLanes; ++l) {
    const uint16_t h = float_to_bf16(g.scale[l]);
    __builtin_memcpy(scales + 2 * l, &h, 2);
  }
}

static void mark_not_finite(QuantGroup& g) {
  alignas(64) float zeros[kLanes] = {};
  for (int c = 0; c < g.columns; ++c)
    for (int l = 0; l < kLanes; ++l) zeros[l] += g.w[c][l] * 0.0f;
  for (int l = 0; l < kLanes; ++l) {
    if (zeros[l] == 0.0f) continue;
    g.scale[l] = __builtin_nanf("");
    for (int c = 0; c < g.columns; ++c) g.code[c][l] = 1;
  }
}

static void quant_pack_panel(const PackParams& p, int64_t panel) {
  const PackedLayout& layout = p.layout;
  char* to = p.packed + panel * quant_panel_bytes(layout);
  QuantGroup g;
  for (int64_t k = 0, group = 0; k < layout.k; k += layout.group, ++group) {
    g.columns = static_cast<int>(layout.k - k < layout.group ? layout.k - k : layout.group);
    quant_load(p, panel * kLanes, k, g);
    if (layout.kind == PackedKind::kInt8)
      round_int8(g);
    else
      round_int4(g);
    mark_not_finite(g);
    char* scales = to + quant_scales_at(layout, group);
    __builtin_memset(scales, 0, (group % 2 == 0 ? 2 : 1) * kQuantScaleBytes);
    quant_write(layout.kind, g, to + quant_codes_at(layout, group), scales);
  }
}

}  // namespace SPS_ISA_NS
}  // namespace sps
