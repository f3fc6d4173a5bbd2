#pragma once
#include <cstddef>

#if defined(__GNUC__)
#define ZSAD_PREFETCH(address) __builtin_prefetch(address)
#else
#define ZSAD_PREFETCH(address)
#endif

namespace zsad {
namespace {  // compiled for several instruction sets, of which none may take another's place

// The product of two vectors, while the one that comes next is fetched. Everywhere the same sum, bit by bit: of 64 sums
// side by side, so that none waits for the one before, in pairs.
inline float dot(const float* left, const float* right, const float* next, std::size_t channels) {
  constexpr std::size_t kLine = 16, kLanes = 4 * kLine;  // floats
  float lanes[kLanes] = {};
  std::size_t c = 0;
  for (; c + kLanes <= channels; c += kLanes) {
    for (std::size_t line = 0; line < kLanes; line += kLine) ZSAD_PREFETCH(next + c + line);
#pragma omp simd
    for (std::size_t i = 0; i < kLanes; ++i) lanes[i] += left[c + i] * right[c + i];
  }
  for (std::size_t i = 0; c < channels; ++c, ++i) lanes[i] += left[c] * right[c];
  for (std::size_t half = kLanes / 2; half > 0; half /= 2) {
#pragma omp simd
    for (std::size_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

}  // namespace
}  // namespace zsad
