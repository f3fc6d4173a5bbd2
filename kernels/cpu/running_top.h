#pragma once
#include <cstddef>
#include <cstdint>

namespace zsad {

// The largest products of every row so far, and the chunk of columns that may raise them.
struct Kept {
  int first, columns;     // number of the chunk's first column among all of them, and how many the chunk has
  int count;              // K
  float* values;          // [rows, K] in and out: descending; before the first chunk the lowest float
  std::int32_t* indices;  // [rows, K] in and out: their columns
};

// One chunk of products on its way into the best of every row.
struct RunningTop {
  const float* products;  // [rows, columns], row p at products + p * stride
  std::ptrdiff_t stride;  // in floats
  int rows;
  Kept kept;
};

void running_top_portable(const RunningTop&);
void running_top_avx2(const RunningTop&);
void running_top_avx512(const RunningTop&);

// Of every instruction set its own.
namespace {

inline float smallest(const Kept& kept, int row) {
  return kept.values[std::size_t(row) * kept.count + kept.count - 1];
}

// Raise the largest of a row by its products with the columns begin, begin + 1, ..., end - 1 of the chunk.
inline void raise(const Kept& kept, int row, const float* products, int begin, int end) {
  float* values = kept.values + std::size_t(row) * kept.count;
  std::int32_t* indices = kept.indices + std::size_t(row) * kept.count;
  for (int c = begin; c < end; ++c) {
    const float value = products[c - begin];
    int at = kept.count - 1;
    if (!(value > values[at])) continue;
    for (; at > 0 && values[at - 1] < value; --at) {
      values[at] = values[at - 1];
      indices[at] = indices[at - 1];
    }
    values[at] = value;
    indices[at] = kept.first + c;
  }
}

}  // namespace
}  // namespace zsad
