// How keys and values lie in a page.
#pragma once

#include <cstdint>

namespace sps {

enum class KvFormat : int32_t {
  kNative,  // d elements of the queries' dtype
  kInt8,    // d int8, then the float32 that each of them is multiplied by
  kFp8,     // d bytes of fp8 e4m3 (largest value 448, no infinities)
};

constexpr int64_t kMaxQuantizedDim = 512;

// Bytes of one token's row of one head in a quantised page.
constexpr int64_t quantized_row(KvFormat format, int64_t d) {
  return format == KvFormat::kInt8 ? d + 4 : d;
}

}  // namespace sps
