// Kernels for AVX-512 with dot products of bfloat16 and of bytes.
#define SPS_ISA_NS avx512_bf16
#define SPS_WIDE_REGISTERS 1
#define SPS_HAS_DPBF16 1
#define SPS_HAS_VNNI 1
#include "kernels/simd_avx512.h"
#include "kernels/modes_bf16.h"
#include "kernels/table.h"

namespace sps {
const KernelTable& avx512_bf16_table() { return avx512_bf16::table; }
}  // namespace sps
