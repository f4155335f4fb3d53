// A few rows of bfloat16 x times a quantized panel in integers: codes are bytes already, need no
// conversion, and a group's sum is exact. Within a group a row of x is fixed point of one or two
// signed bytes, scale * high or scale * (256 * high + low): off by at most 2^-16 of the group's
// largest with two, where bfloat16 itself rounds that one by up to 2^-9; by 2^-8 with one.
#pragma once

#include "kernels/quant_tile.h"

namespace sps {
namespace SPS_ISA_NS {

#ifdef SPS_HAS_VNNI

// VPDPBUSD takes one side unsigned: 128 is added to codes, and taken off the sum by starting at
// -128 * sum(x).
constexpr int kCodeOffset = 128;

struct Int8Bytes {
  static constexpr int kBytes = 128, kDigits = 2;
  const char* block;
  explicit Int8Bytes(const char* block) : block(block) {}
  __m512i codes(int half) const {
    const __m512i codes = _mm512_loadu_si512(block + 64 * half);
    return _mm512_xor_si512(codes, _mm512_set1_epi8(static_cast<char>(kCodeOffset)));
  }
};

// One byte: what it adds to the error of 4-bit weights is not seen, and it halves the arithmetic.
struct Int4Bytes {
  static constexpr int kBytes = 64, kDigits = 1;
  __m512i nibbles;
  explicit Int4Bytes(const char* block) : nibbles(_mm512_loadu_si512(block)) {}
  __m512i codes(int half) const {
    const __m512i values = _mm512_broadcast_i32x4(_mm_xor_si128(
        _mm_loadu_si128(reinterpret_cast<const __m128i*>(kInt4Values)),
        _mm_set1_epi8(static_cast<char>(kCodeOffset))));
    const __m512i index = half == 0 ? nibbles : _mm512_srli_epi16(nibbles, 4);
    return _mm512_shuffle_epi8(values, _mm512_and_si512(index, _mm512_set1_epi8(15)));
  }
};

static inline __m512i bcast_int(const char* p) {
  int32_t x;
  __builtin_memcpy(&x, p, 4);
  return _mm512_set1_epi32(x);
}

constexpr int64_t kFixedPrefetch = 2048;
constexpr int kFixedPrefetchRows = 6;  // fewer wait for memory, and hinder it by asking

constexpr int fixed_chains(int sums) { return sums <= 8 ? 2 : 1; }

// Cells of a group: rows of {scale: float, -128 * sum: int}, then for each four columns rows of
// {high: 4 bytes} or {high: 4 bytes, low: 4 bytes}.
template <class Codes, int kRows>
static void fixed_tile(const QuantTile& t) {
  constexpr bool kTwo = Codes::kDigits == 2;
  constexpr int kCell = 4 * Codes::kDigits, kChains = fixed_chains(Codes::kDigits * kRows);
  __m512 total[kRows];
  __m512i high[kChains * kRows], low[kChains * kRows];
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m) total[m] = _mm512_setzero_ps();
  const char* x = t.cells;
  const int64_t group_blocks = t.layout->group / kQuantBlock;
  int64_t group = t.first_group;
  for (int64_t left = t.blocks; left > 0; left -= group_blocks, ++group) {
    const char* codes = t.panel + quant_codes_at(*t.layout, group);
    const char* const head = x;
#pragma GCC unroll 16
    for (int i = 0; i < kChains * kRows; ++i) {
      high[i] = _mm512_setzero_si512();
      low[i] = i < kRows ? bcast_int(head + 8 * i + 4) : _mm512_setzero_si512();
      if (!kTwo) high[i] = low[i];
    }
    x += 8 * kRows;
    const int64_t blocks = left < group_blocks ? left : group_blocks;
    for (int64_t b = 0; b < blocks; ++b, codes += Codes::kBytes) {
      const Codes block(codes);
#pragma GCC unroll 2
      for (int i = 0; i < Codes::kBytes; i += 64) {
        if (t.to_next != 0)
          __builtin_prefetch(codes + i + t.to_next, 0, 2);
        else if (kRows >= kFixedPrefetchRows)
          __builtin_prefetch(codes + i + kFixedPrefetch);
      }
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half, x += kCell * kRows) {
        const __m512i w = block.codes(half);
#pragma GCC unroll 16
        for (int m = 0; m < kRows; ++m) {
          const int at = half % kChains * kRows + m;
          high[at] = _mm512_dpbusd_epi32(high[at], w, bcast_int(x + kCell * m));
          if (kTwo) low[at] = _mm512_dpbusd_epi32(low[at], w, bcast_int(x + kCell * m + 4));
        }
      }
    }
    const __m512 scale = Wide::load_bf16(t.panel + quant_scales_at(*t.layout, group));
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m) {
      __m512i h = high[m], l = low[m];
#pragma GCC unroll 4
      for (int c = 1; c < kChains; ++c) {
        h = _mm512_add_epi32(h, high[c * kRows + m]);
        l = _mm512_add_epi32(l, low[c * kRows + m]);
      }
      const __m512i sum = kTwo ? _mm512_add_epi32(_mm512_slli_epi32(h, 8), l) : h;
      const __m512 both = _mm512_mul_ps(scale, Wide::bcast(head + 8 * m));
      total[m] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), both, total[m]);
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m) Wide::store(t.sums + m * Wide::W, total[m]);
}

// One row's group: its scale and digits, and -128 times the sum of what these stand for.
struct FixedGroup {
  float scale;
  int32_t start;
  int8_t high[kQuantMaxGroup], low[kQuantMaxGroup];
};

constexpr uint32_t kFixedLeast = 0x08800000;  // 2^-110: a group of x below is taken for 0
constexpr uint32_t kInfinity = 0x7f800000;

static void fixed_group(const char* x, int columns, int digits, FixedGroup& g) {
  const int padded = (columns + 15) / 16 * 16;
  alignas(64) char room[2 * kQuantMaxGroup];
  if (padded != columns) {
    __builtin_memset(room, 0, static_cast<size_t>(2 * padded));
    __builtin_memcpy(room, x, static_cast<size_t>(2 * columns));
    x = room;
  }
  __m512i most = _mm512_setzero_si512();
  for (int c = 0; c < padded; c += 16) {
    const __m512i bits = _mm512_castps_si512(Wide::load_bf16(x + 2 * c));
    most = _mm512_max_epu32(most, _mm512_and_si512(bits, _mm512_set1_epi32(0x7fffffff)));
  }
  const uint32_t largest_bits = _mm512_reduce_max_epu32(most);  // as integers: NaN is the largest
  float largest;
  __builtin_memcpy(&largest, &largest_bits, 4);
  const float full = digits == 2 ? 127.0f * 256.0f : 127.0f;
  const bool usable = largest_bits >= kFixedLeast && largest_bits < kInfinity;
  g.scale = largest_bits >= kInfinity ? __builtin_nanf("") : usable ? largest / full : 0.0f;
  const __m512 inverse = _mm512_set1_ps(usable ? full / largest : 0.0f);
  const __mmask16 taken = usable ? 0xffff : 0;
  __m512i sum = _mm512_setzero_si512();
  for (int c = 0; c < padded; c += 16) {
    const __m512i q =
        _mm512_maskz_cvtps_epi32(taken, _mm512_mul_ps(Wide::load_bf16(x + 2 * c), inverse));
    const __m512i high =
        digits == 2 ? _mm512_srai_epi32(_mm512_add_epi32(q, _mm512_set1_epi32(128)), 8) : q;
    const __m512i low = _mm512_sub_epi32(q, _mm512_slli_epi32(high, 8));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(g.high + c), _mm512_cvtepi32_epi8(high));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(g.low + c), _mm512_cvtepi32_epi8(low));
    sum = _mm512_add_epi32(sum, q);
  }
  g.start = -kCodeOffset * _mm512_reduce_add_epi32(sum);
}

static void fill_fixed(const PackedLinearParams& p, const QuantRows& rows) {
  const int64_t k = p.column_end - p.column_begin;
  const int digits = p.layout.kind == PackedKind::kInt8 ? 2 : 1;
  char* to = rows.cells;
  FixedGroup g;
  for (int64_t c = 0; c < k; c += p.layout.group) {
    const int columns = static_cast<int>(k - c < p.layout.group ? k - c : p.layout.group);
    const int fours = (columns + kQuantBlock - 1) / kQuantBlock * 2;
    for (int r = 0; r < rows.rows; ++r) {
      if (r < rows.m)
        fixed_group(p.x + (rows.m_begin + r) * p.x_stride + 2 * c, columns, digits, g);
      else
        __builtin_memset(&g, 0, sizeof g);
      __builtin_memcpy(to + 8 * r, &g.scale, 4);
      __builtin_memcpy(to + 8 * r + 4, &g.start, 4);
      char* cell = to + 8 * rows.rows + 4 * digits * r;
      for (int i = 0; i < fours; ++i, cell += 4 * digits * rows.rows) {
        __builtin_memcpy(cell, g.high + 4 * i, 4);
        if (digits == 2) __builtin_memcpy(cell + 4, g.low + 4 * i, 4);
      }
    }
    to += rows.rows * (8 + 4 * digits * fours);
  }
}

#endif

}  // namespace SPS_ISA_NS
}  // namespace sps
