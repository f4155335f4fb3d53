// Sparse attention's kernels for AVX-512 (F, BW, DQ, VL).
#define SPS_ISA_NS avx512
#define SPS_WIDE_REGISTERS 1
#include "kernels/simd_avx512.h"
#include "kernels/sparse_kernel.h"
