#pragma once
#include <cstddef>

namespace zsad {

// Vectors on their way to unit length.
struct UnitVectors {
  const float* vectors;   // [count, C], row n at vectors + n * stride
  std::ptrdiff_t stride;  // in floats
  int count, channels;    // count, C
  float* units;           // [count, C] out; a zero vector stays zero
  double* lengths;        // [count] out, not finite where a vector is not
};

void unit_vectors_portable(const UnitVectors&);
void unit_vectors_avx2(const UnitVectors&);
void unit_vectors_avx512(const UnitVectors&);

}  // namespace zsad
