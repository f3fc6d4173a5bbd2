// Exact cosines of winners that an approximate product has chosen.
//
//   cosines[k, p] = sum over c of left[p, c] * right[image[k, p] - first, patch[k, p], c]
//
// One left feature stays in the first-level cache for its K winners; each winner is one contiguous read from anywhere
// in the resident features, so memory decides the speed: the next winner is fetched while the present one is summed.
// Compiled once per instruction set (ZSAD_TARGET).
#include "winner_cosines.h"

#include "dot.h"

#define ZSAD_JOIN_(a, b) a##b
#define ZSAD_JOIN(a, b) ZSAD_JOIN_(a, b)

namespace zsad {

void ZSAD_JOIN(winner_cosines_, ZSAD_TARGET)(const WinnerCosines& a) {
  const std::size_t C = a.channels;
  struct {
    const float *left, *right;
    float* cosine;
  } waiting{};
  for (int p = 0; p < a.patches; ++p) {
    for (int k = 0; k < a.ranks; ++k) {
      const std::size_t i = std::size_t(k) * a.patches + p;
      const int image = a.image[i] - a.first;
      if (image < 0 || image >= a.count) continue;
      const float* right = a.right + (std::size_t(image) * a.right_patches + a.patch[i]) * C;
      if (waiting.cosine) *waiting.cosine = dot(waiting.left, waiting.right, right, C);
      waiting = {a.left + p * C, right, a.cosines + i};
    }
  }
  if (waiting.cosine) *waiting.cosine = dot(waiting.left, waiting.right, waiting.right, C);
}

}  // namespace zsad
