// Merge of attention states: weighted sum of partial outputs by their log-sum-exp.
#pragma once

#include <cstdint>

namespace sps {

constexpr int kMaxMergeParts = 256;

// Strides in bytes for o, in elements for lse; the last dim of o is contiguous.
struct StateView {
  char* o;
  int64_t o_token_stride, o_head_stride;
  float* lse;
  int64_t lse_token_stride, lse_head_stride;
  bool bf16;
};

struct MergeParams {
  const StateView* parts;
  int n;
  StateView out;  // may be one of the parts
  int64_t tokens;
  int heads, d;
};

// Merges on `threads` threads.
void merge_states(const MergeParams& params, int threads);

}  // namespace sps
