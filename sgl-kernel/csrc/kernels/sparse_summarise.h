// Summaries of full pages: what sps/sparse.h says a page's summary holds.
#pragma once

#include <cmath>

#include "kernels/modes.h"
#include "sps/sparse.h"

namespace sps {
namespace SPS_ISA_NS {

struct Bf16Element {
  static constexpr int kBytes = 2;
  static Wide::reg load(const char* p) { return Wide::load_bf16(p); }
  static void store(char* p, Wide::reg x) { Wide::store_bf16(p, x); }
};

struct F32Element {
  static constexpr int kBytes = 4;
  static Wide::reg load(const char* p) { return Wide::load(p); }
  static void store(char* p, Wide::reg x) { Wide::store(p, x); }
};

// Codes of Wide::W channels of a key, its place between low and high to the nearest of four, as
// Wide::W / 4 bytes.
static inline void write_codes(Wide::reg key, Wide::reg low, Wide::reg step, char* codes) {
  float place[Wide::W];
  Wide::store(place, Wide::div(Wide::sub(key, low), step));
  for (int i = 0; i < Wide::W / 4; ++i) {
    int byte = 0;
    for (int j = 0; j < 4; ++j) {
      const float code = ::nearbyintf(place[4 * i + j]);
      byte |= (code < 0.0f ? 0 : code > 3.0f ? 3 : static_cast<int>(code)) << (2 * j);
    }
    codes[i] = static_cast<char>(byte);
  }
}

// Channels c to c + Wide::W of one page. Steps are rounded to the pages' dtype before codes are
// taken, so that codes fit what is read back.
template <class E>
static void summarise_channels(const SummaryLayout& t, const char* k, int64_t k_stride,
                               const char* v, int64_t v_stride, int c, char* out) {
  const int at = c * E::kBytes;
  Wide::reg low = Wide::set1(INFINITY), high = Wide::set1(-INFINITY);
  Wide::reg sum_k = Wide::zero(), sum_v = Wide::zero();
  for (int i = 0; i < t.page; ++i) {
    const Wide::reg x = E::load(k + i * k_stride + at);
    low = Wide::sub(Wide::zero(), Wide::max(Wide::sub(Wide::zero(), low),
                                            Wide::sub(Wide::zero(), x)));
    high = Wide::max(high, x);
    sum_k = Wide::add(sum_k, x);
    sum_v = Wide::add(sum_v, E::load(v + i * v_stride + at));
  }
  const Wide::reg share = Wide::set1(1.0f / static_cast<float>(t.page));
  const Wide::reg third = Wide::div(Wide::sub(high, low), Wide::set1(3.0f));
  E::store(out + t.low + at, low);
  E::store(out + t.step + at, Wide::max(third, Wide::set1(1e-9f)));
  E::store(out + t.mean_k + at, Wide::mul(sum_k, share));
  E::store(out + t.mean_v + at, Wide::mul(sum_v, share));
  const Wide::reg step = E::load(out + t.step + at);
  char* codes = out + t.codes + c / 4;
  for (int i = 0; i < t.page; ++i, codes += t.d / 4)
    write_codes(E::load(k + i * k_stride + at), low, step, codes);
}

// The last channels overlap those before them where d is no multiple of a register: they come out
// the same. d is at least 16.
template <class E>
static void summarise_page(const SummaryLayout& t, const char* k, int64_t k_stride, const char* v,
                           int64_t v_stride, char* out) {
  for (int c = 0; c < t.d; c += Wide::W)
    summarise_channels<E>(t, k, k_stride, v, v_stride, c + Wide::W <= t.d ? c : t.d - Wide::W, out);
}

void summarise_range(const SummariseParams& p, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const int64_t slot = p.slots[i / p.kv_heads], head = i % p.kv_heads;
    const char* k = p.k + slot * p.k_layout.slot_stride + head * p.k_layout.head_stride;
    const char* v = p.v + slot * p.v_layout.slot_stride + head * p.v_layout.head_stride;
    char* out = p.out + slot * p.out_slot_stride + head * p.out_head_stride;
    const int64_t ks = p.k_layout.token_stride, vs = p.v_layout.token_stride;
    if (p.layout.bf16)
      summarise_page<Bf16Element>(p.layout, k, ks, v, vs, out);
    else
      summarise_page<F32Element>(p.layout, k, ks, v, vs, out);
  }
}

}  // namespace SPS_ISA_NS
}  // namespace sps
