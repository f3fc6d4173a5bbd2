#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace zsad {

// The largest products of every row so far, and the chunk of columns that may raise them. With margins only products
// larger than the `wanted`-th largest so far less its row's margin are taken, and behind the `wanted` largest they come
// in any order.
struct Kept {
  int first, columns;     // number of the chunk's first column among all of them, and how many the chunk has
  int count;              // K
  float* values;          // [rows, K] in and out: descending; before the first chunk the lowest float
  std::int32_t* indices;  // [rows, K] in and out: their columns
  int wanted;             // up to K
  const float* margins;   // [rows], or none
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

// Products up to this one are not taken.
inline float smallest(const Kept& kept, int row) {
  const float* values = kept.values + std::size_t(row) * kept.count;
  return kept.margins ? values[kept.wanted - 1] - kept.margins[row] : values[kept.count - 1];
}

// Raise the largest of a row by its products with the columns begin, begin + 1, ..., end - 1 of the chunk.
inline void raise(const Kept& kept, int row, const float* products, int begin, int end) {
  float* values = kept.values + std::size_t(row) * kept.count;
  std::int32_t* indices = kept.indices + std::size_t(row) * kept.count;
  for (int c = begin; c < end; ++c) {
    const float value = products[c - begin];
    if (!(value > smallest(kept, row))) continue;
    int at = 0;
#pragma omp simd reduction(+ : at)
    for (int k = 0; k < kept.count; ++k) at += values[k] >= value;
    const std::size_t moved = kept.count - 1 - at;
    std::memmove(values + at + 1, values + at, moved * sizeof *values);
    std::memmove(indices + at + 1, indices + at, moved * sizeof *indices);
    values[at] = value;
    indices[at] = kept.first + c;
  }
}

}  // namespace
}  // namespace zsad
