// Rows of a packed weight as they were before packing: an embedding whose table is the head's weight.
#pragma once

#include "sps/packed.h"

namespace sps {

// out[i] = row ids[i] of the weight, of kind kF32 or kBf16 and not cut, in its own dtype; throws
// std::invalid_argument for an id outside of [0, n). Strides in bytes; rows of `out` are contiguous.
struct PackedRowsParams {
  PackedLayout layout;
  const char* packed;
  const char* ids;
  bool ids64;
  char* out;
  int64_t out_stride, count;
};

void packed_rows(const PackedRowsParams& params);

}  // namespace sps
