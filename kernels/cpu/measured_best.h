#pragma once
#include <cstddef>
#include <cstdint>

namespace zsad {

// Candidates of some queries, from G runs through a bank of unit vectors, and room for the best of them.
struct MeasuredBest {
  const float* queries;                        // [Q, C]
  int rows, channels;                          // Q, C
  const float* values;                         // [G, Q, K] products, off by up to an error
  const std::int32_t* numbers;                 // [G, Q, K] their vectors in the bank, -1 where there is none
  int runs, count;                             // G, K
  std::ptrdiff_t values_stride, numbers_stride;  // of a run, in entries
  const float* errors;                         // [Q]
  const float* bank;                           // [M, C]
  const float* inverse;                        // [M] inverse lengths, or none where all are 1
  bool all;                                    // whether every vector is a candidate
  int wanted;                                  // k
  float* cosines;                              // [Q, k] out: descending; of equal ones the lower number comes first
  std::int64_t* indices;                       // [Q, k] out
  bool* doubtful;                              // [Q] out: whether a nearer vector may be no candidate
};

void measured_best_portable(const MeasuredBest&);
void measured_best_avx2(const MeasuredBest&);
void measured_best_avx512(const MeasuredBest&);

}  // namespace zsad
