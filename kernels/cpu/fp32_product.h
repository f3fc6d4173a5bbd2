#pragma once
#include <algorithm>
#include <cstddef>

namespace zsad {

// out[p, q] = left[p] . right[q]
struct Fp32Product {
  const float *left, *right;               // [rows, channels] and [columns, channels]
  std::ptrdiff_t left_pitch, right_pitch;  // floats from row to row
  int rows, columns, channels;
  float* out;  // [rows, columns]
  std::ptrdiff_t pitch;
};

void fp32_product_avx512amx(const Fp32Product&);

// How much of such a product is split at a time.
struct Fp32Split {
  static constexpr int kFill = 32;           // what all numbers are filled up to
  static constexpr std::size_t kNumber = 6;  // bytes of a float's parts
  static constexpr int kMostChannels = 1024, kMostColumns = 1024;
  static constexpr std::size_t kMostBytes = 960 << 10;  // of rows, to stay in the second-level cache

  int channels, rows, columns;

  Fp32Split(int rows, int columns, int channels)
      : channels(up(shared(channels, kMostChannels))),
        rows(std::min(up(rows), std::max(kFill, int(kMostBytes / (kNumber * this->channels)) / kFill * kFill))),
        columns(std::min(up(columns), kMostColumns)) {}
  std::size_t row_bytes() const { return kNumber * channels; }
  std::size_t bytes() const { return (std::size_t(rows) + columns) * row_bytes(); }

 private:
  static int up(int n) { return (n + kFill - 1) / kFill * kFill; }
  // As many in every part, of as few parts as may be.
  static int shared(int n, int most) {
    const int parts = (n + most - 1) / most;
    return (n + parts - 1) / parts;
  }
};

}  // namespace zsad
