// What the processor offers, and which of the compiled kernel tables is in use.
#pragma once

#include <string>
#include <utility>
#include <vector>

namespace sps {

enum class Isa : int { kGeneric = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3 };

const char* isa_name(Isa isa);

// Feature name -> present, as cpuid and the operating system's saved state report them.
std::vector<std::pair<std::string, bool>> cpu_features();

// Instruction sets that are compiled in and that this processor runs, worst first.
std::vector<Isa> available_isas();

struct KernelTable;

// The table in use: the best available one unless set_isa() chose another.
const KernelTable& kernels();
Isa current_isa();
// Throws std::invalid_argument when `name` is unknown or not available here.
void set_isa(const std::string& name);

}  // namespace sps
