#include "sps/cpu.h"

#include <atomic>
#include <stdexcept>

#include "sps/kernel_table.h"

#if defined(__x86_64__) || defined(_M_X64)
#include <cpuid.h>
#define SPS_X86 1
#endif

namespace sps {
namespace {

struct Features {
  bool avx2 = false, fma = false, f16c = false;
  bool avx512f = false, avx512dq = false, avx512bw = false, avx512vl = false;
  bool avx512_bf16 = false, avx512_vnni = false, amx_bf16 = false;
};

#ifdef SPS_X86
uint64_t xgetbv0() {
  uint32_t lo, hi;
  __asm__ volatile("xgetbv" : "=a"(lo), "=d"(hi) : "c"(0));
  return (static_cast<uint64_t>(hi) << 32) | lo;
}

Features detect() {
  Features f;
  uint32_t a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !((c >> 27) & 1)) return f;  // no OSXSAVE
  const uint64_t saved = xgetbv0();
  const bool ymm = (saved & 0x6) == 0x6, zmm = (saved & 0xe6) == 0xe6;
  f.fma = ymm && ((c >> 12) & 1);
  f.f16c = ymm && ((c >> 29) & 1);
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return f;
  f.avx2 = ymm && ((b >> 5) & 1);
  f.avx512f = zmm && ((b >> 16) & 1);
  f.avx512dq = zmm && ((b >> 17) & 1);
  f.avx512bw = zmm && ((b >> 30) & 1);
  f.avx512vl = zmm && ((b >> 31) & 1);
  f.avx512_vnni = zmm && ((c >> 11) & 1);
  f.amx_bf16 = ((d >> 22) & 1) && (saved & 0x60000) == 0x60000;
  if (a >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) f.avx512_bf16 = zmm && ((a >> 5) & 1);
  return f;
}
#else
Features detect() { return {}; }
#endif

const Features& features() {
  static const Features f = detect();
  return f;
}

struct Entry {
  Isa isa;
  const KernelTable* table;
};

std::vector<Entry> entries() {
  const Features& f = features();
  (void)f;
  std::vector<Entry> list{{Isa::kGeneric, &generic_table()}};
#ifdef SPS_WITH_AVX2
  if (f.avx2 && f.fma && f.f16c) list.push_back({Isa::kAvx2, &avx2_table()});
#endif
#ifdef SPS_WITH_AVX512
  const bool avx512 = f.avx512f && f.avx512dq && f.avx512bw && f.avx512vl && f.fma && f.f16c;
  if (avx512) list.push_back({Isa::kAvx512, &avx512_table()});
#ifdef SPS_WITH_AVX512_BF16
  if (avx512 && f.avx512_bf16 && f.avx512_vnni) list.push_back({Isa::kAvx512Bf16, &avx512_bf16_table()});
#endif
#endif
  return list;
}

std::atomic<const Entry*>& current() {
  static const std::vector<Entry> all = entries();
  static std::atomic<const Entry*> entry{&all.back()};
  return entry;
}

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kAvx2: return "avx2";
    case Isa::kAvx512: return "avx512";
    case Isa::kAvx512Bf16: return "avx512_bf16";
    default: return "generic";
  }
}

std::vector<std::pair<std::string, bool>> cpu_features() {
  const Features& f = features();
  return {{"avx2", f.avx2},
          {"fma", f.fma},
          {"f16c", f.f16c},
          {"avx512f", f.avx512f},
          {"avx512dq", f.avx512dq},
          {"avx512bw", f.avx512bw},
          {"avx512vl", f.avx512vl},
          {"avx512_bf16", f.avx512_bf16},
          {"avx512_vnni", f.avx512_vnni},
          {"amx_bf16", f.amx_bf16}};
}

std::vector<Isa> available_isas() {
  std::vector<Isa> list;
  for (const Entry& e : entries()) list.push_back(e.isa);
  return list;
}

const KernelTable& kernels() { return *current().load(std::memory_order_relaxed)->table; }

Isa current_isa() { return current().load()->isa; }

void set_isa(const std::string& name) {
  static const std::vector<Entry> all = entries();
  for (const Entry& e : all)
    if (name == isa_name(e.isa)) return current().store(&e);
  throw std::invalid_argument("instruction set '" + name + "' is not available here");
}

}  // namespace sps
