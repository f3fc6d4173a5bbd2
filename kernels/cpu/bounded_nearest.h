#pragma once
#include <cstddef>
#include <cstdint>

#include "int8_layout.h"

namespace zsad {

// Where the parts of the bounds of P unit vectors lie in their buffer, in bytes.
struct BoundsLayout {
  Int8Layout heads;
  std::size_t rests, errors, longest, bytes;

  BoundsLayout(int P, int h) : heads(P, h) {
    const std::size_t padded = std::size_t(heads.panels) * kPanel;
    rests = (heads.bytes + 63) / 64 * 64;      // float rests [panels, 16]: lengths of what the codes leave of a vector
    errors = rests + sizeof(float) * padded;   // float errors [panels, 16]: lengths of what they leave of its head
    longest = errors + sizeof(float) * padded; // float: at least the longest of the heads' codes
    bytes = (longest + sizeof(float) + 63) / 64 * 64;
  }
};

// heads: [P, h] the first h coordinates of vectors less a mean in an orthogonal basis; terms: [P] mean . u[p] -
// |mean|^2 / 2; tails: [P] squares of what the coordinates leave; out: a buffer of layout.bytes bytes on a cache line.
struct Bounding {
  const float *heads, *terms, *tails;
  BoundsLayout layout;
  unsigned char* out;
};

void bound_vectors_portable(const Bounding&);
void bound_vectors_avx2(const Bounding&);
void bound_vectors_avx512vnni(const Bounding&);
void bound_vectors_avx512amx(const Bounding&);

// Unit vectors [P, C] of an image and their bounds.
struct BoundedImage {
  const float* units;
  const unsigned char* bounds;
  BoundsLayout layout;
};

constexpr int kGroup = 3 * kPanel;  // vectors of a bank that lie near each other

// The k nearest of a bank of vectors, which lies in groups of kGroup vectors each; their bounds are one behind the other.
// queries: their units, and bounds in the order of queue, [P], best one in which those that follow each other are alike;
// reach: [P, groups] at least the largest product of a query with a vector of a group; halves: [groups, kGroup, C] the
// vectors of the groups where 16-bit floats are exactly these, with AVX-512 alone, or null; bank: [M, C], of these inverse lengths [M] or, where null, of 1; order:
// [groups, kGroup] the vectors of each group, -1 for none; cosines, indices: [P, k] out, of equal cosines the lower index
// first; given_up: [P] out, whether more than most_taken products would have been taken.
struct BankSearch {
  BoundedImage queries;
  const std::int32_t* queue;
  int channels;
  const unsigned char* bounds;
  BoundsLayout layout;
  int groups;
  const float* reach;
  const std::int32_t* order;
  const std::uint16_t* halves;
  const float *bank, *inverse;
  int wanted, most_taken;
  float* cosines;
  std::int64_t* indices;
  bool* given_up;
};

// Return how many products were taken in full.
std::int64_t bounded_search_portable(const BankSearch&);
std::int64_t bounded_search_avx2(const BankSearch&);
std::int64_t bounded_search_avx512vnni(const BankSearch&);
std::int64_t bounded_search_avx512amx(const BankSearch&);

}  // namespace zsad
