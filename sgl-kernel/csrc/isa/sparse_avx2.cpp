// Sparse attention's kernels for AVX2 with FMA and F16C.
#define SPS_ISA_NS avx2
#include "kernels/simd_avx2.h"
#include "kernels/sparse_kernel.h"
