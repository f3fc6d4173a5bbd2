#pragma once
#include <cstddef>
#include <cstdint>

namespace zsad {

// One chunk of products on its way into the best of every row.
struct RunningTop {
  const float* products;  // [rows, columns], row p at products + p * stride
  std::ptrdiff_t stride;  // in floats
  int rows, columns;
  int first;              // number of the first column among all of them
  int kept;               // K
  float* values;          // [rows, K] in and out: the largest so far, descending; before the first chunk the lowest float
  std::int32_t* indices;  // [rows, K] in and out: their columns
};

void running_top_portable(const RunningTop&);
void running_top_avx2(const RunningTop&);
void running_top_avx512(const RunningTop&);

}  // namespace zsad
