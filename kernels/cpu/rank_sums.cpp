// What a patch's distances of the chosen ranks add up to, found by selection instead of sorting.
//
//   sums[p] = sum over ranks first … last - 1 of values[p, j], ascending, over the images j that count
//
// Shapes and types of the arguments: rank_sums.h.
//
// The rank-th smallest value is found by bisection between the extremes: the bits of floats that are not negative order
// like the floats, so that some 25 passes of one comparison per vector suffice, whatever the values. Equal values are
// added as often as they are counted, and the sums of so few floats are exact in doubles, so that neither the order of
// ties nor that of the images changes a result. A few patches at a time are copied together, for whichever of the two
// axes is contiguous. cuda/interval_average.cu is the sibling.
// Compiled once per instruction set (ZSAD_TARGET).
#include "rank_sums.h"

#include <cstring>
#include <vector>

#define ZSAD_JOIN_(a, b) a##b
#define ZSAD_JOIN(a, b) ZSAD_JOIN_(a, b)

namespace zsad {
namespace {

constexpr int kTogether = 16;  // patches: a cache line of floats

std::int32_t bits_of(float value) {
  std::int32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits & 0x7fffffff;  // zero may have a sign
}

float float_of(std::int32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

int count_up_to(const float* values, int count, float threshold) {
  int found = 0;
#pragma omp simd reduction(+ : found)
  for (int k = 0; k < count; ++k) found += values[k] <= threshold;
  return found;
}

// Sum of the `ranks` smallest of `count` values, which lie between lowest and highest.
double sum_of_smallest(const float* values, int count, int ranks, float lowest, float highest) {
  if (ranks == 0) return 0.0;
  double sum = 0.0;
  if (ranks == count) {
#pragma omp simd reduction(+ : sum)
    for (int k = 0; k < count; ++k) sum += values[k];
    return sum;
  }
  std::int32_t low = bits_of(lowest), high = bits_of(highest);
  while (low < high) {
    const std::int32_t middle = low + (high - low) / 2;
    if (count_up_to(values, count, float_of(middle)) >= ranks) high = middle;
    else low = middle + 1;
  }
  const float threshold = float_of(low);
  int below = 0;
#pragma omp simd reduction(+ : sum, below)
  for (int k = 0; k < count; ++k) {
    const bool smaller = values[k] < threshold;
    sum += smaller ? values[k] : 0.0f;
    below += smaller;
  }
  return sum + double(ranks - below) * threshold;
}

double sum_of_ranks(const float* values, const RankSums& a) {
  float lowest = values[0], highest = values[0];
#pragma omp simd reduction(min : lowest) reduction(max : highest)
  for (int k = 0; k < a.count; ++k) {
    lowest = values[k] < lowest ? values[k] : lowest;
    highest = values[k] > highest ? values[k] : highest;
  }
  return sum_of_smallest(values, a.count, a.last, lowest, highest) -
         sum_of_smallest(values, a.count, a.first, lowest, highest);
}

}  // namespace

void ZSAD_JOIN(rank_sums_, ZSAD_TARGET)(const RankSums& a) {
  std::vector<float> together(std::size_t(kTogether) * a.count);
  for (int p = 0; p < a.patches; p += kTogether) {
    const int wide = a.patches - p < kTogether ? a.patches - p : kTogether;
    for (int k = 0; k < a.count; ++k)
      for (int b = 0; b < wide; ++b)
        together[std::size_t(b) * a.count + k] = a.values[(p + b) * a.patch_step + a.images[k] * a.image_step];
    for (int b = 0; b < wide; ++b) a.sums[p + b] = sum_of_ranks(together.data() + std::size_t(b) * a.count, a);
  }
}

}  // namespace zsad
