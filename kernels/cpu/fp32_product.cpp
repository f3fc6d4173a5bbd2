// A product of two matrices of floats by AMX, which is faster than BLAS with AVX-512.
//
//   out[p, q] = left[p] . right[q], as sums of products of bfloat16 parts (float_parts.h)
//
// Of the left side so many rows are split at a time as stay in the second-level cache while the right ones, split
// before, pass by. Every product is the sum of the same numbers in the same order, wherever it lies.
#include "fp32_product.h"

#include "float_parts.h"

#include <vector>

namespace zsad {
namespace {

constexpr std::size_t kLine = 64;

// Adds to products [rows, columns], or begins them.
void multiply_block(const std::uint8_t* left, int rows, const std::uint8_t* right, int columns, std::size_t steps,
                    bool begin, float* out, std::ptrdiff_t pitch) {
  const std::size_t row_part = part_bytes_of(rows, steps), panel_part = part_bytes_of(kPairRows, steps);
  const int blocks = (rows + kPairRows - 1) / kPairRows;
  const std::size_t lines = kParts * panel_part / kLine / (blocks * steps) + 1;
  for (int q = 0; q < columns; q += kPairRows) {
    const std::uint8_t* panels = right + q / kPairRows * kParts * panel_part;
    const char* following = reinterpret_cast<const char*>(panels + kParts * panel_part);
    const auto fetch = [&] {
      for (std::size_t line = 0; line < lines; ++line, following += kLine) _mm_prefetch(following, _MM_HINT_T1);
    };
    for (int p = 0; p < rows; p += kPairRows) {
      const std::uint8_t* of_rows = left + p / kPairRows * panel_part;
      const int height = std::min(kPairRows, rows - p), width = std::min(kPairRows, columns - q);
      float* to = out + p * pitch + q;
      if (height == kPairRows && width == kPairRows) {
        multiply_parts<2>(of_rows, row_part, panels, panel_part, steps, begin, to, pitch * sizeof(float), fetch);
        continue;
      }
      alignas(64) float some[kPairRows][kPairRows];
      for (int i = 0; !begin && i < height; ++i) std::copy_n(to + i * pitch, width, some[i]);
      multiply_parts<2>(of_rows, row_part, panels, panel_part, steps, begin, some[0], sizeof some[0], fetch);
      for (int i = 0; i < height; ++i) std::copy_n(some[i], width, to + i * pitch);
    }
  }
}

}  // namespace

void fp32_product_avx512amx(const Fp32Product& a) {
  const Fp32Split at_once(a.rows, a.columns, a.channels);
  // Fresh memory would take as long as the product.
  static thread_local std::vector<std::uint8_t> room;
  room.resize(std::max(room.size(), at_once.bytes() + kLine));
  std::uint8_t* const left = room.data() + (-reinterpret_cast<std::uintptr_t>(room.data())) % kLine;
  std::uint8_t* const right = left + at_once.rows * at_once.row_bytes();
  const Tiles tiles;
  for (int from = 0; from < a.channels; from += at_once.channels) {
    const int channels = std::min(at_once.channels, a.channels - from);
    for (int column = 0; column < a.columns; column += at_once.columns) {
      const int columns = std::min(at_once.columns, a.columns - column);
      split_columns(a.right + column * a.right_pitch + from, a.right_pitch, columns, channels, right);
      for (int row = 0; row < a.rows; row += at_once.rows) {
        const int rows = std::min(at_once.rows, a.rows - row);
        split_rows(a.left + row * a.left_pitch + from, a.left_pitch, rows, channels, left);
        multiply_block(left, rows, right, columns, steps_of(channels), from == 0, a.out + row * a.pitch + column,
                       a.pitch);
      }
    }
  }
}

}  // namespace zsad
