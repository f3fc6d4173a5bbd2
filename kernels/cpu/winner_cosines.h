#pragma once
#include <cstddef>
#include <cstdint>

namespace zsad {

// Winners of one image and degree, K of them per patch, among `count` resident images numbered from `first` on.
struct WinnerCosines {
  const float* left;      // [P, C] unit features of the image
  const float* right;     // [count, Q, C] unit features of the resident images
  int patches, right_patches, channels;  // P, Q, C
  int first, count;
  int ranks;                  // K
  const std::int32_t* image;  // [K, P] image of the winner; those that are not resident are left out
  const std::int32_t* patch;  // [K, P] patch of the winner in that image
  float* cosines;             // [K, P] out
};

void winner_cosines_portable(const WinnerCosines&);
void winner_cosines_avx2(const WinnerCosines&);
void winner_cosines_avx512(const WinnerCosines&);

}  // namespace zsad
