// Linear layers over packed weights: cut into panels of 16 outputs once, read in order ever after.
#pragma once

#include <cstdint>
#include <vector>

namespace sps {

enum class PackedKind : int { kBf16 = 0, kF32 = 1, kInt8 = 2, kInt4 = 3 };

constexpr int kPanelOutputs = 16;

// A panel holds 16 rows of a weight [n, k], cell after cell along k: one float, or two bfloat16
// (k odd: the last is 0), of each row in turn. Rows beyond n are 0. Panels follow one another. For
// the kinds with codes and scales see quant.h.
struct PackedLayout {
  PackedKind kind;
  int64_t n, k, group;  // group: columns that share a scale; unused by kinds without scales
};

int64_t panel_bytes(const PackedLayout& layout);
int64_t packed_bytes(const PackedLayout& layout);

// Strides in bytes; rows of `weight` are contiguous.
struct PackParams {
  PackedLayout layout;
  char* packed;
  char* weight;  // [n, k]: read by pack_weight, written by unpack_weight
  int64_t weight_stride;
  bool weight_bf16;
};

// Between formats bfloat16 widens exactly and float32 rounds to nearest even.
void pack_weight(const PackParams& params, int threads);
void unpack_weight(const PackParams& params);

// Some columns of a weight, counted from the first one of the slice that holds them: a weight may be
// cut along k and each slice packed by itself, so that who needs one slice reads memory in order.
struct PackedPiece {
  PackedLayout layout;   // of the slice
  int64_t panel_stride;  // panel_bytes of it
  const char* packed;
  int64_t column_begin, column_end;
};

// out[m, row_end - row_begin] = x W[rows, columns]^T + bias, where x has the columns of all pieces,
// one after another, of which there is at least one. Strides in bytes; rows of x and out are
// contiguous and need no alignment. row_begin is a multiple of 16; pieces begin and end at whole
// cells (for codes: groups), but for the last one's end.
struct PackedLinearParams {
  PackedLayout layout;  // of the whole weight
  std::vector<PackedPiece> pieces;
  int64_t row_begin, row_end;
  const char* x;
  int64_t x_stride;
  bool x_bf16;
  const char* bias;  // [row_end - row_begin]; null: none
  bool bias_bf16;
  char* out;
  int64_t out_stride;
  bool out_bf16;
  int64_t m;
};

// Columns of x.
inline int64_t packed_columns(const PackedLinearParams& p) {
  int64_t columns = 0;
  for (const PackedPiece& piece : p.pieces) columns += piece.column_end - piece.column_begin;
  return columns;
}

void packed_linear(const PackedLinearParams& params, int threads);

// Part of a packed_linear that one thread computes: rows of x, panels counted from row_begin.
struct PackedBlock {
  int64_t m_begin, m_end, panel_begin, panel_end;
};

}  // namespace sps
