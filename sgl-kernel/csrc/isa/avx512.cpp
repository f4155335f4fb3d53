// Kernels for AVX-512 (F, BW, DQ, VL).
#define SPS_ISA_NS avx512
#define SPS_WIDE_REGISTERS 1
#include "kernels/simd_avx512.h"
#include "kernels/table.h"

namespace sps {
const KernelTable& avx512_table() { return avx512::table; }
}  // namespace sps
