#include "sps/packed_rows.h"

#include <cstring>
#include <stdexcept>
#include <string>

namespace sps {
namespace {

constexpr int64_t kCellBytes = 4;
constexpr int64_t kStride = kPanelOutputs * kCellBytes;  // from a row's cell to its next

int64_t id_at(const PackedRowsParams& p, int64_t i) {
  if (!p.ids64) {
    int32_t id;
    std::memcpy(&id, p.ids + 4 * i, 4);
    return id;
  }
  int64_t id;
  std::memcpy(&id, p.ids + 8 * i, 8);
  return id;
}

// Every cell lies in a cache line of its own, but the lines follow one another.
void gather(const char* from, int64_t bytes, char* to) {
  const int64_t cells = bytes / kCellBytes, rest = bytes % kCellBytes;
  for (int64_t c = 0; c < cells; ++c) std::memcpy(to + c * kCellBytes, from + c * kStride, 4);
  std::memcpy(to + cells * kCellBytes, from + cells * kStride, static_cast<size_t>(rest));
}

}  // namespace

void packed_rows(const PackedRowsParams& p) {
  const int64_t bytes = p.layout.k * (p.layout.kind == PackedKind::kBf16 ? 2 : 4);
  for (int64_t i = 0; i < p.count; ++i) {
    const int64_t id = id_at(p, i);
    if (id < 0 || id >= p.layout.n)
      throw std::invalid_argument("ids[" + std::to_string(i) + "] = " + std::to_string(id) +
                                  " lies outside [0, " + std::to_string(p.layout.n) + ")");
    const char* panel = p.packed + id / kPanelOutputs * panel_bytes(p.layout);
    gather(panel + id % kPanelOutputs * kCellBytes, bytes, p.out + i * p.out_stride);
  }
}

}  // namespace sps
