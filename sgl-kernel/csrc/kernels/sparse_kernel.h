// From masses to shares: the end of sparse_scores.h.
#pragma once

#include "kernels/sparse_chunk.h"
#include "kernels/sparse_summarise.h"

namespace sps {
namespace SPS_ISA_NS {

constexpr float kMostMass = 1e38f;

// 1 / the mass that each row of a register sees in all; false where it is too large for a float.
// 0 in the lanes from `lanes` on, which repeat a row.
template <class M>
static bool invert_total(const ShareState<M>& st, int reg, int lanes, int pages, float* inverse) {
  alignas(64) float own[Wide::W];
  for (int i = 0; i < Wide::W; ++i)
    own[i] = st.own[reg * Wide::W + i] - st.ref[reg * Wide::W + i];
  Wide::reg total = Wide::exp2(Wide::load(own));
  for (int j = 0; j < pages; ++j)
    total = Wide::add(total, Wide::load(st.mass + (int64_t{j} * st.regs + reg) * Wide::W));
  const bool fits = Wide::hmax(total) < kMostMass;
  Wide::store(inverse, Wide::div(Wide::set1(1.0f), total));
  for (int i = lanes; i < Wide::W; ++i) inverse[i] = 0.0f;
  return fits;
}

// The norm of each page's shares over the rows and heads of block b; false where some row's mass
// did not fit.
template <class M>
static bool write_shares(const ShareParams& p, const ShareUnit& u, int b, ShareState<M>& st) {
  const RowSpan span = st.span[b];
  const int pages = pages_before(u.blocks[b], p.layout.page);
  const int lanes = p.group * u.rows[b];
  for (int reg = span.first; reg < span.last; ++reg)
    if (!invert_total(st, reg, lanes - (reg - span.first) * Wide::W, pages,
                      st.inverse + reg * Wide::W))
      return false;
  for (int j = 0; j < pages; ++j) {
    const float* mass = st.mass + int64_t{j} * st.regs * Wide::W;
    Wide::reg squares = Wide::zero();
    for (int at = span.first * Wide::W; at < span.last * Wide::W; at += Wide::W) {
      const Wide::reg share = Wide::mul(Wide::load(mass + at), Wide::load(st.inverse + at));
      squares = Wide::fma(share, share, squares);
    }
    u.shares[b][j] = ::sqrtf(Wide::hsum(squares));
  }
  return true;
}

// Masses of a block's rows are relative to their largest scores from now on.
template <class M>
static void raise_refs(const ShareParams& p, const ShareUnit& u, int b, ShareState<M>& st) {
  const int pages = pages_before(u.blocks[b], p.layout.page);
  for (int i = st.span[b].first * Wide::W; i < st.span[b].last * Wide::W; ++i) {
    float most = 0.0f;
    for (int j = 0; j < pages; ++j) {
      const float x = (st.mass[int64_t{j} * st.regs * Wide::W + i] - PowerSum::kBias) /
                      PowerSum::kScale;
      most = x > most ? x : most;
    }
    st.ref[i] += most;
  }
}

// Masses are relative to a row's own block, whose share is seldom small; where a block's rows find
// more than kMostMass times that, its masses are computed again, relative to the largest scores.
template <class M>
static void share_unit(const ShareParams& p, const ShareUnit& u) {
  ShareState<M> st(p, u);
  load_rows<M>(p, u, st);
  for (int b = 0; b < u.count; ++b) own_mass<M>(p, u.blocks[b], u.kv_head, st.span[b], st);
  score_pages<M, false>(p, u, st);
  bool fits[kShareBlocks], all = true;
  for (int b = 0; b < u.count; ++b) all = (fits[b] = write_shares<M>(p, u, b, st)) && all;
  if (all) return;
  score_pages<M, true>(p, u, st);
  for (int b = 0; b < u.count; ++b)
    if (!fits[b]) raise_refs<M>(p, u, b, st);
  score_pages<M, false>(p, u, st);
  for (int b = 0; b < u.count; ++b) write_shares<M>(p, u, b, st);
}

void page_share_unit(const ShareParams& p, const ShareUnit& u) {
  if (p.layout.bf16)
    share_unit<Bf16Mode>(p, u);
  else
    share_unit<ModeF32>(p, u);
}

}  // namespace SPS_ISA_NS
}  // namespace sps
