#pragma once
// Keys of winners (gram_pass.h) from candidates: cosines - 1 that carry a patch number in their lowest bits. In the low
// bits of a cosine near 1 the number would cost what tells winners apart; there it does not.
#include <algorithm>
#include <cstdint>
#include <cstring>

namespace zsad {
namespace {  // compiled for several instruction sets, of which none may take another's place

inline float with_index(float value, std::uint32_t index_mask, std::uint32_t index) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  bits = (bits & ~index_mask) | index;
  std::memcpy(&value, &bits, sizeof bits);
  return value;
}

// The key of the best candidate.
inline float to_key(float value, std::uint32_t index_mask) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return with_index(std::max(-value, 0.0f), index_mask, bits & index_mask);
}

}  // namespace
}  // namespace zsad
