// Sparse attention's kernels in plain C++.
#define SPS_ISA_NS generic
#include "kernels/simd_generic.h"
#include "kernels/sparse_kernel.h"
