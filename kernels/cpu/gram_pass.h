#pragma once
#include <cstddef>
#include <cstdint>

namespace zsad {

constexpr int kMaxReach = 4;             // degree 9
constexpr int kMaxKeyPatches = 1 << 16;  // leaves a key 7 bits of mantissa

// A key is a float, 1 - cosine of a patch and its winner (so that the nearest winner has the smallest key), whose
// lowest bits, as many as the largest patch number has, hold the winner's patch number.
inline std::uint32_t index_mask(int patches) {
  std::uint32_t mask = 0;
  while (mask < std::uint32_t(patches - 1)) mask = 2 * mask + 1;
  return mask;
}

// One image pair and layer; P = rows * columns patches on both sides, R degrees.
struct GramPass {
  const float* gram;           // [P, P], row p at gram + p * gram_stride: dot products of layer-normed tokens
  std::ptrdiff_t gram_stride;  // in floats
  int rows, columns;           // the patch grid
  const int* degrees;          // [R], odd, at most 2 * kMaxReach + 1
  int degree_count;
  const float* inverse_left;   // [R, P] 1 / length of the box-summed tokens, 0 where the length is 0
  const float* inverse_right;  // [R, P]
  float* best_left;            // [R, P] out: largest cosine of each left patch with any right patch, or its key
  float* best_right;           // [R, P] out: largest cosine of each right patch with any left patch, or its key
  bool keys;                   // keys instead of cosines; P at most kMaxKeyPatches
  bool narrow;                 // with keys: the Gram is approximate, and 16 bits will do where they are enough; then
                               // inverse lengths must be those of the very tokens whose products are in the Gram
  int window;  // rows and columns that q lies away from p at most; max(rows, columns) and more: any number.
               // Of the Gram only those entries are read with at most window + 2 * reach rows between p and q, where
               // reach is half of the largest degree.
};

void gram_pass_portable(const GramPass&);
void gram_pass_avx2(const GramPass&);
void gram_pass_avx512(const GramPass&);

}  // namespace zsad
