#include "sps/quant.h"

#include <algorithm>
#include <cstring>

#include "kernels/quant_format.h"
#include "sps/cpu.h"
#include "sps/kernel_table.h"
#include "sps/scratch.h"
#include "sps/thread_pool.h"

namespace sps {
namespace {

int64_t panels_of(int64_t n) { return (n + kPanelOutputs - 1) / kPanelOutputs; }

// Tasks of a few panels each, a few tasks for each thread.
template <class F>
void over_panels(int threads, int64_t panels, F&& f) {
  const int64_t step = threads == 1 ? panels : (panels + 4 * threads - 1) / (4 * threads);
  parallel_for(threads, (panels + step - 1) / step,
               [&](int64_t i) { f(i * step, std::min(panels, (i + 1) * step)); });
}

}  // namespace

bool quantized(PackedKind kind) {
  return kind == PackedKind::kInt8 || kind == PackedKind::kInt4;
}

int64_t quant_panel_bytes(const PackedLayout& layout) {
  const int64_t groups = (layout.k + layout.group - 1) / layout.group;
  const int64_t blocks = (layout.k + kQuantBlock - 1) / kQuantBlock;
  return blocks * quant_block_bytes(layout.kind) + (groups + 1) / 2 * 2 * kQuantScaleBytes;
}

void quant_pack(const PackParams& params, int threads) {
  const KernelTable& table = kernels();
  parallel_for(threads, panels_of(params.layout.n),
               [&](int64_t panel) { table.quant_pack_panel(params, panel); });
}

void quant_unpack(const PackParams& p) {
  const PackedLayout& layout = p.layout;
  for (int64_t n = 0; n < layout.n; ++n) {
    const int output = static_cast<int>(n % kPanelOutputs);
    const char* panel = p.packed + n / kPanelOutputs * quant_panel_bytes(layout);
    char* to = p.weight + n * p.weight_stride;
    for (int64_t k = 0; k < layout.k; ++k) {
      const int64_t group = k / layout.group, within = k % layout.group / kQuantBlock;
      const char* block = panel + quant_codes_at(layout, group) +
                          within * quant_block_bytes(layout.kind);
      const int code =
          quant_code(layout.kind, block, static_cast<int>(k % kQuantBlock), output);
      const float w = code * quant_scale(panel + quant_scales_at(layout, group), output);
      const uint16_t h = float_to_bf16(w);
      if (p.weight_bf16)
        std::memcpy(to + 2 * k, &h, 2);
      else
        std::memcpy(to + 4 * k, &w, 4);
    }
  }
}

void quant_linear(const PackedLinearParams& p, int threads) {
  const int64_t panels = panels_of(p.row_end - p.row_begin);
  if (p.m == 0 || panels == 0) return;
  const KernelTable& table = kernels();
  const int64_t columns = (packed_columns(p) + kQuantBlock - 1) / kQuantBlock * kQuantBlock;
  if (p.m >= kQuantManyRows) {
    return over_panels(threads, panels, [&](int64_t begin, int64_t end) {
      table.quant_many(p, begin, end);
    });
  }
  for (int64_t m = 0; m < p.m;) {
    QuantRows rows = table.quant_rows(p, m);
    rows.cells = static_cast<char*>(thread_scratch(static_cast<size_t>(columns * rows.rows * 4), 1));
    table.quant_fill_rows(p, rows);
    over_panels(threads, panels, [&](int64_t begin, int64_t end) {
      table.quant_panels(p, rows, begin, end);
    });
    m += rows.m;
  }
}

}  // namespace sps
