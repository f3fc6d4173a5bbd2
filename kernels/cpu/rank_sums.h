#pragma once
#include <cstddef>
#include <cstdint>

namespace zsad {

// Distances of patches to images, and which of them are added up.
struct RankSums {
  const float* values;  // not negative; of patch p and image j at values[p * patch_step + j * image_step]
  std::ptrdiff_t patch_step, image_step;  // in floats
  int patches;
  const std::int32_t* images;  // [count] numbers of the images that count
  int count;
  int first, last;  // ranks, 0 <= first < last <= count
  double* sums;     // [patches] out
};

void rank_sums_portable(const RankSums&);
void rank_sums_avx2(const RankSums&);
void rank_sums_avx512(const RankSums&);

}  // namespace zsad
