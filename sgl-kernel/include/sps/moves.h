// What a decode step does beside its kernels: rows looked up, added, laid side by side, summed over
// ranks, and the angles of rotary embedding. Few bytes each; plain C++, one result on every machine.
#pragma once

#include <cstdint>

namespace sps {

// Strides in bytes; the last dim is contiguous. Elements are (i, j, c), i < n, j < m, c < dim.
struct CopyParams {
  const char* src;
  char* dst;
  int64_t src_i, src_j, dst_i, dst_j;
  int64_t n, m, dim;
  bool src_bf16, dst_bf16;
};

// dst = src, rounded to dst's dtype.
void copy(const CopyParams& params);

// dst += src in float32, rounded once; one dtype.
void add(const CopyParams& params);

// out[i] = table[ids[i]]; throws std::invalid_argument for an id outside of [0, rows).
struct LookUpParams {
  const char* ids;
  bool ids64;
  const char* table;
  int64_t table_stride, rows, row_bytes;
  char* out;
  int64_t out_stride, n;
};

void look_up(const LookUpParams& params);

// out = the sum of `parts` arrays of n elements that lie `part_stride` bytes apart, added in float32
// in their order.
struct SumParams {
  const char* parts;
  int64_t part_stride, count, n;
  char* out;
  bool bf16;
};

void sum_parts(const SumParams& params);

// out[t] = cos(angle), then sin(angle), times scale, of angle f = positions[t] * frequencies[f], all
// in float32.
struct AngleParams {
  const char* positions;
  bool positions64;
  const float* frequencies;
  float scale;
  float* out;
  int64_t out_stride, n, dim;  // stride in elements
};

void rope_angles(const AngleParams& params);

}  // namespace sps
