// Kernels in plain C++.
#define SPS_ISA_NS generic
#include "kernels/simd_generic.h"
#include "kernels/table.h"

namespace sps {
const KernelTable& generic_table() { return generic::table; }
}  // namespace sps
