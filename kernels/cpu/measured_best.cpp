// The nearest of a bank, of candidates that approximate products have chosen.
//
//   worth[p]      = candidates whose product reaches the k-th largest of query p less both errors and, once k are
//                   measured, the k-th largest cosine less their own
//   cosines[p, :] = the k largest of queries[p] . bank[number] * inverse[number] over worth[p], from -1 to 1
//   doubtful[p]   = whether the smallest product of a full run, and with it what the run has left out, reaches the k-th
//
// Shapes and types of the arguments: measured_best.h.
//
// A query stays in the first-level cache for its candidates; each of these is one contiguous read from anywhere in the
// bank, so memory decides the speed: few are measured, the likeliest first, while the next one is fetched.
// Compiled once per instruction set (ZSAD_TARGET).
#include "measured_best.h"

#include "dot.h"

#include <algorithm>
#include <limits>
#include <vector>

#define ZSAD_JOIN_(a, b) a##b
#define ZSAD_JOIN(a, b) ZSAD_JOIN_(a, b)

namespace zsad {
namespace {

constexpr float kLowest = -std::numeric_limits<float>::max();

struct Candidate {
  float value;
  std::int32_t number;
};

bool nearer(const Candidate& a, const Candidate& b) {
  return a.value > b.value || (a.value == b.value && a.number < b.number);
}

// What is worth measuring of a row; the k with the largest products come first.
void choose(const MeasuredBest& a, int row, std::vector<Candidate>& chosen) {
  chosen.clear();
  for (int g = 0; g < a.runs; ++g) {
    const float* values = a.values + g * a.values_stride + std::ptrdiff_t(row) * a.count;
    const std::int32_t* numbers = a.numbers + g * a.numbers_stride + std::ptrdiff_t(row) * a.count;
    for (int k = 0; k < a.count; ++k)
      if (numbers[k] >= 0) chosen.push_back({values[k], numbers[k]});
  }
  if (int(chosen.size()) <= a.wanted) return;
  const auto kth = chosen.begin() + (a.wanted - 1);
  std::nth_element(chosen.begin(), kth, chosen.end(), nearer);
  const float error = a.errors[row], least = kth->value - error;
  chosen.erase(std::remove_if(kth + 1, chosen.end(), [&](const Candidate& c) { return c.value + error < least; }),
               chosen.end());
}

// Measure the candidates of a row, while the next one is fetched, in the end the first one of the next row; fills
// `best` with the k best.
void measure(const MeasuredBest& a, int row, const std::vector<Candidate>& chosen, const float* next_row,
             Candidate* best) {
  const std::size_t C = a.channels;
  const float* query = a.queries + row * C;
  const float error = a.errors[row];
  std::fill_n(best, a.wanted, Candidate{kLowest, -1});
  Candidate& last = best[a.wanted - 1];
  const auto next = [&](std::size_t i) {
    while (i < chosen.size() && chosen[i].value + error < last.value) ++i;
    return i;
  };
  for (std::size_t i = 0; i < chosen.size(); i = next(i + 1)) {
    const std::size_t following = next(i + 1);
    const std::int32_t number = chosen[i].number;
    const float* fetched = following < chosen.size() ? a.bank + chosen[following].number * C : next_row;
    float cosine = dot(query, a.bank + number * C, fetched, C);
    if (a.inverse) cosine *= a.inverse[number];
    Candidate measured{cosine, number};
    if (!nearer(measured, last)) continue;
    for (int k = 0; k < a.wanted; ++k)
      if (nearer(measured, best[k])) std::swap(measured, best[k]);
  }
}

bool may_be_missed(const MeasuredBest& a, int row, float kth) {
  for (int g = 0; g < a.runs && !a.all; ++g) {
    const float* values = a.values + g * a.values_stride + std::ptrdiff_t(row) * a.count;
    float least = values[0];
#pragma omp simd reduction(min : least)
    for (int k = 1; k < a.count; ++k) least = values[k] < least ? values[k] : least;
    if (least + a.errors[row] >= kth) return true;
  }
  return false;
}

}  // namespace

void ZSAD_JOIN(measured_best_, ZSAD_TARGET)(const MeasuredBest& a) {
  std::vector<Candidate> chosen, next, best(a.wanted);
  if (a.rows) choose(a, 0, next);
  for (int row = 0; row < a.rows; ++row) {
    chosen.swap(next);
    if (row + 1 < a.rows) choose(a, row + 1, next);
    const std::int32_t first = next.empty() ? 0 : next.front().number;
    measure(a, row, chosen, a.bank + std::size_t(first) * a.channels, best.data());
    a.doubtful[row] = may_be_missed(a, row, best.back().value);
    for (int k = 0; k < a.wanted; ++k) {
      a.cosines[std::size_t(row) * a.wanted + k] = std::min(1.0f, std::max(-1.0f, best[k].value));
      a.indices[std::size_t(row) * a.wanted + k] = best[k].number;
    }
  }
}

}  // namespace zsad
