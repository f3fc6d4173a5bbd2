#pragma once
#include <cstddef>

#if defined(__GNUC__)
#define ZSAD_PREFETCH(address) __builtin_prefetch(address)
#else
#define ZSAD_PREFETCH(address)
#endif

namespace zsad {
namespace {  // compiled for several instruction sets, of which none may take another's place

// The product of two vectors, while the one that comes next is fetched. Everywhere the same sum, bit by bit.
inline float dot(const float* left, const float* right, const float* next, std::size_t channels) {
  constexpr std::size_t kLine = 16;  // floats
  float lanes[kLine] = {};
  std::size_t c = 0;
  for (; c + kLine <= channels; c += kLine) {
    ZSAD_PREFETCH(next + c);
#pragma omp simd
    for (std::size_t i = 0; i < kLine; ++i) lanes[i] += left[c + i] * right[c + i];
  }
  float sum = 0.0f;
  for (float lane : lanes) sum += lane;
  for (; c < channels; ++c) sum += left[c] * right[c];
  return sum;
}

}  // namespace
}  // namespace zsad
