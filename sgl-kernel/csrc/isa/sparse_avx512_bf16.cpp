// Sparse attention's kernels for AVX-512 with dot products of bfloat16 and of bytes.
#define SPS_ISA_NS avx512_bf16
#define SPS_WIDE_REGISTERS 1
#define SPS_HAS_DPBF16 1
#define SPS_HAS_VNNI 1
#include "kernels/simd_avx512.h"
#include "kernels/modes_bf16.h"
#include "kernels/sparse_kernel.h"
