#pragma once

namespace zsad {

// Box sums of one image's tokens, P = rows * columns patches, R degrees.
struct Pooling {
  const float* tokens;  // [P, C]
  int rows, columns, channels;
  const int* degrees;  // [R], odd
  int degree_count;
  float zero_length;  // features up to this length have no direction
  float* inverse;     // [R, P] out: 1 / length of the box sums, 0 where there is no direction
  float* unit;        // [R, P, C] out: box sums of unit length, or null
};

void pooling_portable(const Pooling&);
void pooling_avx2(const Pooling&);
void pooling_avx512(const Pooling&);

}  // namespace zsad
