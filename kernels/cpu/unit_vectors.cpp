// Vectors divided by their lengths, at the speed of the memory.
//
//   lengths[n] = sqrt(sum over c of vectors[n, c]^2)
//   units[n, c] = vectors[n, c] / lengths[n], zero where that is zero
//
// Squares are added in float64, where no float32 is too large or too small. A vector is read from memory once: it is
// divided while the first-level cache has it.
// Shapes and types of the arguments: unit_vectors.h. Compiled once per instruction set (ZSAD_TARGET).
#include "unit_vectors.h"

#include <cmath>

#define ZSAD_JOIN_(a, b) a##b
#define ZSAD_JOIN(a, b) ZSAD_JOIN_(a, b)

namespace zsad {
namespace {

constexpr int kLanes = 32;

double squared_length(const float* vector, int channels) {
  double lanes[kLanes] = {};
  int c = 0;
  for (; c + kLanes <= channels; c += kLanes) {
#pragma omp simd
    for (int i = 0; i < kLanes; ++i) lanes[i] += double(vector[c + i]) * vector[c + i];
  }
  double sum = 0.0;
  for (double lane : lanes) sum += lane;
  for (; c < channels; ++c) sum += double(vector[c]) * vector[c];
  return sum;
}

}  // namespace

void ZSAD_JOIN(unit_vectors_, ZSAD_TARGET)(const UnitVectors& a) {
  for (int n = 0; n < a.count; ++n) {
    const float* vector = a.vectors + n * a.stride;
    float* unit = a.units + std::size_t(n) * a.channels;
    a.lengths[n] = std::sqrt(squared_length(vector, a.channels));
    const double inverse = a.lengths[n] > 0 ? 1 / a.lengths[n] : 0;
#pragma omp simd
    for (int c = 0; c < a.channels; ++c) unit[c] = float(vector[c] * inverse);
  }
}

}  // namespace zsad
