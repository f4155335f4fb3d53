#include "sps/sampling.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "sps/cpu.h"
#include "sps/kernel_table.h"
#include "sps/scratch.h"

namespace sps {
namespace {

// Order of floats as order of unsigned integers.
uint32_t key_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits ^ ((bits >> 31) ? 0xffffffffu : 0x80000000u);
}

struct Token {
  uint32_t key;
  uint32_t index;
  float weight;
};

// The tokens that come first by (logit falling, index rising): those above `key`, and those at it
// whose index is at most `last`.
struct Boundary {
  uint32_t key = 0;
  int64_t last = INT64_MAX;
  bool keeps(uint32_t k, int64_t index) const { return k > key || (k == key && index <= last); }
};

struct Row {
  const float* logits;
  const float* weights;
  int64_t n;
};

constexpr int kBins = 2048;  // 11 bits of the key at a time
constexpr int kShifts[] = {21, 10, 0};

int bin_of(uint32_t key, int level) {
  return static_cast<int>((key >> kShifts[level]) & (level == 2 ? 1023 : 2047));
}

// Walks the bins from the highest until the mass before the next one reaches the target; takes what
// lies above the bin it stops in off the target.
int stop_bin(const std::vector<double>& mass, double& target) {
  int last = -1;
  for (int bin = kBins - 1; bin >= 0; --bin) {
    if (mass[bin] <= 0) continue;
    if (mass[bin] >= target) return bin;
    target -= mass[bin];
    last = bin;
  }
  // Rounding left a little of the target: everything is kept.
  target = INFINITY;
  return last;
}

// The shortest front of the order whose mass reaches the target, among tokens within `outer`. The
// mass of a token is its weight, or 1. A radix descent: no sort.
Boundary front(const Row& row, const Boundary& outer, bool by_weight, double target) {
  std::vector<double> mass(kBins, 0.0);
  const auto mass_of = [&](float weight) { return by_weight ? double{weight} : 1.0; };
  for (int64_t i = 0; i < row.n; ++i) {
    const uint32_t key = key_of(row.logits[i]);
    if (outer.keeps(key, i)) mass[bin_of(key, 0)] += mass_of(row.weights[i]);
  }
  int bin = stop_bin(mass, target);
  if (bin < 0 || std::isinf(target)) return outer;
  std::vector<Token> rest;
  for (int64_t i = 0; i < row.n; ++i) {
    const uint32_t key = key_of(row.logits[i]);
    if (bin_of(key, 0) == bin && outer.keeps(key, i))
      rest.push_back({key, static_cast<uint32_t>(i), row.weights[i]});
  }
  for (int level = 1; level < 3; ++level) {
    std::fill(mass.begin(), mass.end(), 0.0);
    for (const Token& t : rest) mass[bin_of(t.key, level)] += mass_of(t.weight);
    bin = stop_bin(mass, target);
    rest.erase(std::remove_if(rest.begin(), rest.end(),
                              [&](const Token& t) { return bin_of(t.key, level) != bin; }),
               rest.end());
  }
  // What is left has one and the same key, in order of index.
  size_t i = 0;
  for (double before = 0; i + 1 < rest.size(); ++i) {
    before += mass_of(rest[i].weight);
    if (before >= target) break;
  }
  return {rest[i].key, rest[i].index};
}

double kept_mass(const Row& row, const Boundary& b, float least) {
  double sum = 0;
  for (int64_t i = 0; i < row.n; ++i)
    if (row.weights[i] >= least && b.keeps(key_of(row.logits[i]), i)) sum += row.weights[i];
  return sum;
}

// The token at which the running mass of the kept ones, by index, passes `uniform` of the whole.
int64_t draw(const Row& row, const Boundary& b, float least, double uniform) {
  const double target = uniform * kept_mass(row, b, least);
  double sum = 0;
  int64_t last = -1;
  for (int64_t i = 0; i < row.n; ++i) {
    if (row.weights[i] <= 0 || row.weights[i] < least) continue;
    if (!b.keeps(key_of(row.logits[i]), i)) continue;
    sum += row.weights[i];
    last = i;
    if (sum > target) break;
  }
  return last;
}

}  // namespace

int64_t sample(const SamplingParams& p) {
  if (p.n == 0) return -1;
  const KernelTable& table = kernels();
  float* logits = static_cast<float*>(thread_scratch(2 * p.n * sizeof(float)));
  float* weights = logits + p.n;
  const float most = table.load_logits(p.logits, p.bf16, p.n, logits);
  if (most == -INFINITY) return -1;
  const float scale = static_cast<float>(1.0 / p.temperature);
  if (p.temperature == 0 || std::isinf(most) || std::isinf(scale))
    return std::find(logits, logits + p.n, most) - logits;
  table.exp_weights(logits, p.n, most, scale, weights);
  const Row row{logits, weights, p.n};
  Boundary kept;
  if (p.top_k > 0 && p.top_k < p.n) kept = front(row, kept, false, static_cast<double>(p.top_k));
  if (p.top_p < 1) kept = front(row, kept, true, p.top_p * kept_mass(row, kept, 0.0f));
  return draw(row, kept, static_cast<float>(p.min_p), p.uniform);
}

int64_t largest(const float* values, int64_t n) { return kernels().largest_index(values, n); }

}  // namespace sps
