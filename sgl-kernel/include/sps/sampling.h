// Drawing one token from a row of logits without sorting it.
#pragma once

#include <cstdint>

namespace sps {

struct SamplingParams {
  const char* logits;
  int64_t n;
  bool bf16;
  double temperature;  // 0: greedy
  int64_t top_k;       // <= 0 or >= n: off
  double top_p;        // 1: off
  double min_p;        // 0: off
  double uniform;      // in [0, 1)
};

// The token, or -1 when no logit is above -inf (NaN counts as -inf).
int64_t sample(const SamplingParams& params);

// The first of the largest of n >= 1 values; if there is a NaN, the first of those, as NumPy has it.
int64_t largest(const float* values, int64_t n);

}  // namespace sps
