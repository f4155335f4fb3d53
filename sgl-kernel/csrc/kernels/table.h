// Gathers the kernels of one instruction set; included last by the files in isa/.
#pragma once

#include "kernels/attention_decode.h"
#include "kernels/elementwise_kernel.h"
#include "kernels/gemm_kernel.h"
#include "kernels/merge_kernel.h"
#include "kernels/packed_kernel.h"
#include "kernels/quant_kernel.h"
#include "kernels/quant_many.h"
#include "kernels/quant_pack.h"
#include "kernels/sampling_kernel.h"
#include "sps/kernel_table.h"

namespace sps {
namespace SPS_ISA_NS {

// In translation units of their own (isa/sparse_*.cpp), which halves the longest compilation.
void summarise_range(const SummariseParams& p, int64_t begin, int64_t end);
void page_share_unit(const ShareParams& p, const ShareUnit& u);

static const KernelTable table = {
    attention_unit,
    attention_max_rows,
    write_merged,
    merge_tokens,
    small_gemm_range,
    packed_linear_block,
    quant_pack_panel,
    quant_rows,
    quant_fill_rows,
    quant_panels,
    quant_many,
    rms_norm_range,
    silu_mul_range,
    rope_range,
    load_logits,
    exp_weights,
    largest_index,
    summarise_range,
    page_share_unit,
};

}  // namespace SPS_ISA_NS
}  // namespace sps
