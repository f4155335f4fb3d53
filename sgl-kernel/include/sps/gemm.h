// y = x w^T + bias for few rows of x: the weights are read once, at memory speed.
#pragma once

#include <cstdint>

namespace sps {

// Strides in bytes; rows are contiguous.
struct SmallGemmParams {
  const char* x;
  int64_t x_stride;
  const char* w;
  int64_t w_stride;
  const char* bias;  // null: none
  char* y;
  int64_t y_stride;
  int64_t m, n, k;
  bool bf16;       // dtype of x and w: bfloat16, else float32
  bool bias_bf16;
  bool y_bf16;
};

void small_gemm(const SmallGemmParams& params, int threads);

}  // namespace sps
