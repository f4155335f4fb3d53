// A few rows of bfloat16 x times a quantized panel in integers: codes are bytes already, need no
// conversion, and a group's sum is exact. Within a group a row of x is fixed point of one or two
// signed bytes, scale * high or scale * (256 * high + low): off by at most 2^-16 of the group's
// largest with two, where bfloat16 itself rounds that one by up to 2^-9; by 2^-8 with one. One byte
// halves the arithmetic. 4-bit weights always have it: beside their errors it is not seen. 8-bit
// weights have it from that number of rows on at which two would make arithmetic the bound.
#pragma once

#include "kernels/quant_tile.h"

namespace sps {
namespace SPS_ISA_NS {

#ifdef SPS_HAS_VNNI

// VPDPBUSD takes one side unsigned: 128 is added to codes, and taken off the sum by starting at
// -128 * sum(x).
constexpr int kCodeOffset = 128;

struct Int8Bytes {
  static constexpr int kBytes = 128;
  static constexpr int digits(int rows) { return rows <= 4 ? 2 : 1; }
  const char* block;
  explicit Int8Bytes(const char* block) : block(block) {}
  __m512i codes(int half) const {
    const __m512i codes = _mm512_loadu_si512(block + 64 * half);
    return _mm512_xor_si512(codes, _mm512_set1_epi8(static_cast<char>(kCodeOffset)));
  }
};

struct Int4Bytes {
  static constexpr int kBytes = 64;
  static constexpr int digits(int) { return 1; }
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

typedef int32_t LooseInt __attribute__((may_alias, aligned(1)));

// sum += codes . the 4 bytes at x, for each output. As one instruction in place: of the intrinsic
// GCC 12 makes a broadcast, a product and a move, which costs eight rows a seventh of their speed.
static inline void add_products(__m512i& sum, __m512i codes, const char* x) {
  __asm__("vpdpbusd %2%{1to16%}, %1, %0"
          : "+v"(sum)
          : "v"(codes), "m"(*reinterpret_cast<const LooseInt*>(x)));
}

constexpr int64_t kFixedPrefetch = 2048;
constexpr int kFixedPrefetchRows = 5;  // fewer wait for memory, and hinder it by asking

// Sums of kRows rows over one group of a panel.
template <class Codes, int kRows>
struct FixedSums {
  static constexpr int kDigits = Codes::digits(kRows), kCell = 4 * kDigits;
  // Independent sums of each number where there are few, so that they need not wait for one another.
  static constexpr int kChains = kDigits * kRows <= 4 ? 2 : 1;
  __m512i high[kChains * kRows], low[kChains * kRows];

  explicit FixedSums(const char* head) {
#pragma GCC unroll 32
    for (int i = 0; i < kChains * kRows; ++i) {
      high[i] = _mm512_setzero_si512();
      low[i] = i < kRows ? bcast_int(head + 8 * i + 4) : high[i];
    }
  }

  void add_block(const char* codes, const char* x) {
    const Codes block(codes);
#pragma GCC unroll 2
    for (int i = 0; i < Codes::kBytes; i += 64)
      if (kRows >= kFixedPrefetchRows) __builtin_prefetch(codes + i + kFixedPrefetch);
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half, x += kCell * kRows) {
      const __m512i w = block.codes(half);
      const int chain = half % kChains * kRows;
#pragma GCC unroll 16
      for (int m = 0; m < kRows; ++m) {
        const char* cell = x + kCell * m;
        if (kDigits == 2) {
          add_products(high[chain + m], w, cell);
          cell += 4;
        }
        add_products(low[chain + m], w, cell);
      }
    }
  }

  __m512 total(int m) const {
    __m512i h = high[m], l = low[m];
#pragma GCC unroll 2
    for (int c = 1; c < kChains; ++c) {
      h = _mm512_add_epi32(h, high[c * kRows + m]);
      l = _mm512_add_epi32(l, low[c * kRows + m]);
    }
    return _mm512_cvtepi32_ps(kDigits == 2 ? _mm512_add_epi32(_mm512_slli_epi32(h, 8), l) : l);
  }
};

// Cells of a group: rows of {scale: float, -128 * sum: int}, then for each four columns rows of
// {its 4 bytes} or {high: 4 bytes, low: 4 bytes}. Sums of groups are added in memory: registers are
// for the sums within one.
template <class Codes, int kRows>
static const char* fixed_tile(const QuantTile& t) {
  using Sums = FixedSums<Codes, kRows>;
  const char* x = t.cells;
  const int64_t group_blocks = t.layout->group / kQuantBlock;
  int64_t group = t.first_group;
  if (!t.add)
    for (int m = 0; m < kRows; ++m) Wide::store(t.sums + m * Wide::W, Wide::zero());
  for (int64_t left = t.blocks; left > 0; left -= group_blocks, ++group) {
    const char* codes = t.panel + quant_codes_at(*t.layout, group);
    const char* const head = x;
    Sums sums(head);
    x += 8 * kRows;
    const int64_t blocks = left < group_blocks ? left : group_blocks;
    for (int64_t b = 0; b < blocks; ++b, codes += Codes::kBytes, x += 2 * Sums::kCell * kRows)
      sums.add_block(codes, x);
    const __m512 scale = Wide::load_bf16(t.panel + quant_scales_at(*t.layout, group));
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m) {
      float* const at = t.sums + m * Wide::W;
      const __m512 both = _mm512_mul_ps(scale, Wide::bcast(head + 8 * m));
      Wide::store(at, _mm512_fmadd_ps(sums.total(m), both, Wide::load(at)));
    }
  }
  return x;
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
  const int64_t k = packed_columns(p);
  const int digits = rows.digits;
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
