#pragma once
#include "tower_layout.h"

#include <cstddef>
#include <cstdint>
#include <vector>

namespace zsad {

// What is wanted behind a block: all patches, through the final norm or as they are.
struct Tap {
  int block;
  bool normed;
  float* out;              // [patches, width] of the first image
  std::size_t image;       // floats from one image to the next
};

// Windows of an image's patches, and of each the class token behind the tower's last block, as that of an image that
// has no other patches.
struct Windows {
  int count, length;           // of an image; tokens of each, the class token first
  const std::int32_t* tokens;  // [count, length], numbers of the image's
  float* out;                  // [batch, count, width]
};

struct TowerRun {
  const float* images;  // [batch, 3, side, side]
  int batch, depth, threads;
  std::vector<Tap> taps;
  float* classes;   // [batch, width], class tokens behind the last of `depth` blocks; may be null
  bool only_first;  // of the last block nothing else is wanted
  std::vector<Windows> windows;
  double* seconds;  // [kTowerParts], which what a thread spends in the mean is added to; null where nobody asks
};

void image_tower_portable(const Tower& tower, const TowerRun& run);
void image_tower_avx2(const Tower&, const TowerRun&);
void image_tower_avx512vnni(const Tower&, const TowerRun&);
void image_tower_avx512amx(const Tower&, const TowerRun&);

}  // namespace zsad
