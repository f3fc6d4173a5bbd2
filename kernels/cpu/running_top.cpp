// The largest products of every row, while chunk after chunk of columns passes by.
//
//   values[p, :], indices[p, :] = the K largest of what they held and of products[p, 0 .. columns), descending; column
//                                 c counts as number first + c, and of equal ones the first to come stays before
//
// Shapes and types of the arguments: running_top.h.
//
// A chunk is read once, from the cache that the product left it in: the maximum of kGroup neighbours tells whether any
// of them is larger than the smallest kept, which after the first chunks hardly ever happens: at 100 000 columns in
// random order K = 48 takes no longer than K = 1.
// Compiled once per instruction set (ZSAD_TARGET).
#include "running_top.h"

#include <algorithm>
#include <limits>

#define ZSAD_JOIN_(a, b) a##b
#define ZSAD_JOIN(a, b) ZSAD_JOIN_(a, b)

namespace zsad {
namespace {

constexpr int kGroup = 64;

float largest(const float* products, int count) {
  float best = -std::numeric_limits<float>::max();
#pragma omp simd reduction(max : best)
  for (int c = 0; c < count; ++c) best = products[c] > best ? products[c] : best;
  return best;
}

}  // namespace

void ZSAD_JOIN(running_top_, ZSAD_TARGET)(const RunningTop& a) {
  for (int p = 0; p < a.rows; ++p) {
    const float* products = a.products + p * a.stride;
    for (int group = 0; group < a.kept.columns; group += kGroup) {
      // A constant count for whole groups, which keeps them in registers.
      const int end = std::min(group + kGroup, a.kept.columns);
      const float best =
          end - group == kGroup ? largest(products + group, kGroup) : largest(products + group, end - group);
      if (best > smallest(a.kept, p)) raise(a.kept, p, products + group, group, end);
    }
  }
}

}  // namespace zsad
