// Kernels for AVX2 with FMA and F16C.
#define SPS_ISA_NS avx2
#include "kernels/simd_avx2.h"
#include "kernels/table.h"

namespace sps {
const KernelTable& avx2_table() { return avx2::table; }
}  // namespace sps
