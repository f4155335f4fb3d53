// RMSNorm (with residual), rotary embedding with KV write, SiLU-and-multiply.
#pragma once

#include <cstdint>

#include "sps/kv_format.h"

namespace sps {

// Strides in bytes; the last dim (dim) is contiguous. Rows are (i, j), i < n, j < m.
struct Rows {
  char* data;
  int64_t stride_i, stride_j;
};

struct RmsNormParams {
  Rows x, out;       // may be the same
  Rows residual;     // data null: none; else residual += x, and the sum is normalised
  const char* weight;
  int64_t n, m, dim;
  float eps;
  bool bf16;         // dtype of x, out and residual
  bool weight_bf16;
};

// out = silu(gate) * up
struct SiluMulParams {
  const char *gate, *up;
  char* out;
  int64_t gate_stride, up_stride, out_stride;
  int64_t n, dim;
  bool bf16;
};

struct RopeParams {
  Rows q, k;              // [tokens, heads, d], rotated in place; data null: absent
  const char* v;          // [tokens, kv_heads, d]
  int64_t v_stride_i, v_stride_j;
  const int32_t* positions;
  const float* cos_sin;   // [positions, rotary], cosines then sines of rotary / 2 angles
  int64_t cos_sin_stride; // in elements
  char *k_pool, *v_pool;  // null: nothing is written
  int64_t k_slot, k_head, k_token, v_slot, v_head, v_token;  // pool strides in bytes
  const int32_t *slots, *offsets;  // slot < 0: this token is not written
  int64_t tokens;
  int heads, kv_heads, d, rotary;
  bool bf16;
  KvFormat format;  // of the pools' rows
};

void rms_norm(const RmsNormParams& params, int threads);
void silu_mul(const SiluMulParams& params, int threads);
void rope_kv_write(const RopeParams& params, int threads);

}  // namespace sps
