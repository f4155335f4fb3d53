// One table of kernels per instruction set. Everything here is plain C types: the files behind the
// tables are compiled with different flags, so nothing inline may be shared between them.
#pragma once

#include "sps/attention.h"
#include "sps/elementwise.h"
#include "sps/gemm.h"
#include "sps/merge.h"
#include "sps/packed.h"
#include "sps/quant.h"

namespace sps {

struct SummariseParams;  // sps/sparse.h
struct ShareParams;
struct ShareUnit;

struct KernelTable {
  void (*attention_unit)(const AttentionParams&, const AttentionUnit&);
  // Rows of one attention unit beyond which a unit should be cut.
  int (*attention_max_rows)(const AttentionParams&);
  // dst[i] = merge over s of parts (o [n, rows, d], lse [n, rows]).
  void (*attention_write_merged)(const AttentionParams&, const AttentionUnit&, const float* o,
                                 const float* lse, int n);
  void (*merge_tokens)(const MergeParams&, int64_t begin, int64_t end);
  void (*small_gemm)(const SmallGemmParams&, int64_t begin, int64_t end);  // weight rows
  void (*packed_linear)(const PackedLinearParams&, const PackedBlock&);
  void (*quant_pack_panel)(const PackParams&, int64_t panel);
  // The rows that one tile takes from m_begin on (without cells), and their cells.
  QuantRows (*quant_rows)(const PackedLinearParams&, int64_t m_begin);
  void (*quant_fill_rows)(const PackedLinearParams&, const QuantRows&);
  // Panels, counted from row_begin: times a few rows, and times all.
  void (*quant_panels)(const PackedLinearParams&, const QuantRows&, int64_t begin, int64_t end);
  void (*quant_many)(const PackedLinearParams&, int64_t begin, int64_t end);
  void (*rms_norm)(const RmsNormParams&, int64_t begin, int64_t end);
  void (*silu_mul)(const SiluMulParams&, int64_t begin, int64_t end);
  void (*rope_kv_write)(const RopeParams&, int64_t begin, int64_t end);
  float (*load_logits)(const char* src, bool bf16, int64_t n, float* dst);
  void (*exp_weights)(const float* x, int64_t n, float shift, float scale, float* p);
  int64_t (*largest_index)(const float* x, int64_t n);
  void (*summarise_range)(const SummariseParams&, int64_t begin, int64_t end);  // (page, head)
  void (*page_share_unit)(const ShareParams&, const ShareUnit&);
};

const KernelTable& generic_table();
const KernelTable& avx2_table();
const KernelTable& avx512_table();
const KernelTable& avx512_bf16_table();

}  // namespace sps
