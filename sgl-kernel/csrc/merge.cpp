#include "sps/merge.h"

#include <algorithm>

#include "sps/cpu.h"
#include "sps/kernel_table.h"
#include "sps/thread_pool.h"

namespace sps {

void merge_states(const MergeParams& params, int threads) {
  const KernelTable& table = kernels();
  const int64_t block = std::max<int64_t>(1, 4096 / std::max(1, params.heads * params.d));
  parallel_for(threads, (params.tokens + block - 1) / block, [&](int64_t i) {
    table.merge_tokens(params, i * block, std::min(params.tokens, (i + 1) * block));
  });
}

}  // namespace sps
