#include "sps/gemm.h"

#include <algorithm>

#include "sps/cpu.h"
#include "sps/kernel_table.h"
#include "sps/thread_pool.h"

namespace sps {

void small_gemm(const SmallGemmParams& params, int threads) {
  if (params.m == 0 || params.n == 0) return;
  const KernelTable& table = kernels();
  // Blocks of weight rows that start at a multiple of 16, a few per thread.
  const int64_t per_thread = (params.n + 4 * threads - 1) / (4 * threads);
  const int64_t whole = std::max<int64_t>(16, (per_thread + 15) / 16 * 16);
  const int64_t block = threads == 1 ? params.n : whole;
  parallel_for(threads, (params.n + block - 1) / block, [&](int64_t i) {
    table.small_gemm(params, i * block, std::min(params.n, (i + 1) * block));
  });
}

}  // namespace sps
