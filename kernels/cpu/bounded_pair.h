#pragma once
#include <cstddef>
#include <cstdint>

#include "int8_layout.h"

namespace zsad {

// Where the parts of the bounds of an image's P unit vectors lie in their buffer, in bytes: of heads of h coordinates,
// of which the first `lead` ones have codes of one scale. The codes' mean terms are what is added to a product of
// codes.
struct PairLayout {
  Int8Layout lead;
  int head;
  std::size_t heads, terms, rests, errors, most_error, bytes;

  PairLayout(int P, int h, int lead_channels) : lead(P, lead_channels), head(h) {
    const std::size_t padded = std::size_t(lead.panels) * kPanel;
    heads = (lead.bytes + 63) / 64 * 64;             // float heads [P, h]
    terms = heads + sizeof(float) * h * P;           // float terms [P]
    rests = terms + sizeof(float) * P;               // float rests [P]: lengths of what heads leave
    errors = rests + sizeof(float) * P;              // float errors [panels, 16]: lengths of what codes leave of leads
    most_error = errors + sizeof(float) * padded;    // float: the longest of those
    bytes = (most_error + sizeof(float) + 63) / 64 * 64;
  }
};

// heads: [P, h] the first h coordinates of unit vectors less a mean in an orthogonal basis, those first in which they
// differ most; terms: [P] mean . u[p] - |mean|^2 / 2; tails: [P] squares of what the coordinates leave; out: a buffer
// of layout.bytes bytes on a cache line.
struct ImageBounding {
  const float *heads, *terms, *tails;
  PairLayout layout;
  unsigned char* out;
};

void bound_image_portable(const ImageBounding&);
void bound_image_avx2(const ImageBounding&);
void bound_image_avx512vnni(const ImageBounding&);

// Unit vectors [P, C] of an image and their bounds.
struct PairSide {
  const float* units;
  const unsigned char* bounds;
  PairLayout layout;
};

// best_left: [P] out, the largest product of each left vector with a right one; best_right: [Q] out, the same of each
// right one. left and right: bounds by the same mean, basis and coordinates; channels: C of both.
struct BoundedPair {
  PairSide left, right;
  int channels;
  float *best_left, *best_right;
};

// Return how many products were taken in full.
std::int64_t bounded_pair_portable(const BoundedPair&);
std::int64_t bounded_pair_avx2(const BoundedPair&);
std::int64_t bounded_pair_avx512vnni(const BoundedPair&);

}  // namespace zsad
