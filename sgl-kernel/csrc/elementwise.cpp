#include "sps/elementwise.h"

#include <algorithm>

#include "sps/cpu.h"
#include "sps/kernel_table.h"
#include "sps/thread_pool.h"

namespace sps {
namespace {

// Calls fn(begin, end) over [0, n) in blocks of some 16k elements.
template <class F>
void blocks(int threads, int64_t n, int64_t row, F&& fn) {
  if (n == 0) return;
  const int64_t block = threads == 1 ? n : std::max<int64_t>(1, 16384 / std::max<int64_t>(1, row));
  parallel_for(threads, (n + block - 1) / block,
               [&](int64_t i) { fn(i * block, std::min(n, (i + 1) * block)); });
}

}  // namespace

void rms_norm(const RmsNormParams& p, int threads) {
  const KernelTable& table = kernels();
  blocks(threads, p.n, p.m * p.dim, [&](int64_t a, int64_t b) { table.rms_norm(p, a, b); });
}

void silu_mul(const SiluMulParams& p, int threads) {
  const KernelTable& table = kernels();
  blocks(threads, p.n, p.dim, [&](int64_t a, int64_t b) { table.silu_mul(p, a, b); });
}

void rope_kv_write(const RopeParams& p, int threads) {
  const KernelTable& table = kernels();
  blocks(threads, p.tokens, int64_t{p.heads + 2 * p.kv_heads} * p.d,
         [&](int64_t a, int64_t b) { table.rope_kv_write(p, a, b); });
}

}  // namespace sps
