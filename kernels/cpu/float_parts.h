#pragma once
// Products of floats by AMX: each float is the sum of three bfloat16 numbers, and a product of two floats that of the
// six products of their parts which are not too small. The sums are as exact as those of fp32: what is left out is
// 2^-24 of the whole in the mean, as what fp32 rounds away, and at worst 2^-20. Bits below 2^-126 are zero to bfloat16,
// so that floats below about 2^-103 lose some. Where so much is not asked for, two rounded parts and
// the three larger products of them leave out 2^-15 of the whole at worst.

#if defined(__AMX_INT8__)
#include "amx.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>

namespace zsad {
namespace {

constexpr int kParts = 3;                 // bfloat16 numbers that make a float, at most
constexpr int kPairRows = 2 * kTileRows;  // of both sides of a block of products
constexpr int kStep = 32;                 // channels that one instruction multiplies
constexpr std::size_t kTileBytes = 1024;

inline std::size_t steps_of(int channels) { return (channels + kStep - 1) / kStep; }

// Bytes of one part of so many rows, which are filled up to pairs of tiles.
inline std::size_t part_bytes_of(int rows, std::size_t steps) {
  return std::size_t(rows + kPairRows - 1) / kPairRows * 2 * steps * kTileBytes;
}

// The first 8 bits of a float's mantissa, the next 8 and the last; of two parts each is rounded.
template <int Parts>
inline void split(__m512 x, __m512i (&parts)[Parts]) {
  const __m512 upper = _mm512_castsi512_ps(_mm512_set1_epi32(int(0xFFFF0000)));
  _Pragma("GCC unroll 3")
  for (int part = 0; part < Parts; ++part) {
    const __m512i half = _mm512_set1_epi32(Parts == 2 ? 0x8000 : 0);  // of a part's last bit
    const __m512 own = _mm512_and_ps(_mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(x), half)), upper);
    parts[part] = _mm512_castps_si512(own);
    x = _mm512_sub_ps(x, own);
  }
}

// At most 16 floats, zeros behind them.
inline __m512 some_floats(const float* x, int count) {
  return _mm512_maskz_loadu_ps(__mmask16(count < 16 ? (1u << std::max(count, 0)) - 1 : 0xFFFF), x);
}

// Splits the 32 channels of a row's step, and stores its parts `part_bytes` apart.
template <int Parts>
inline void split_step(__m512 x, __m512 following, std::uint8_t* to, std::size_t part_bytes) {
  alignas(64) static const struct Odd {
    std::uint16_t word[32];
    Odd() {
      for (int i = 0; i < 32; ++i) word[i] = std::uint16_t(2 * i + 1);
    }
  } odd;
  const __m512i words = _mm512_load_si512(odd.word);
  __m512i first[Parts], second[Parts];
  split(x, first);
  split(following, second);
  for (int part = 0; part < Parts; ++part)
    _mm512_store_si512(to + part * part_bytes, _mm512_permutex2var_epi16(first[part], words, second[part]));
}

// Where a row's step lies among tiles [rows / 16, steps, 16, 32].
inline std::size_t step_at(int row, std::size_t step, std::size_t steps) {
  return (row / kTileRows * steps + step) * kTileBytes + row % kTileRows * 64;
}

// Rows [count, channels] as tiles [parts, rows / 16, steps, 16, 32], channels filled up with zeros. Rows from `count`
// on are left as they were: their products go nowhere.
template <int Parts = kParts>
inline void split_rows(const float* x, std::ptrdiff_t pitch, int count, int channels, std::uint8_t* out) {
  const std::size_t steps = steps_of(channels), part_bytes = part_bytes_of(count, steps);
  for (int row = 0; row < count; ++row)
    for (std::size_t step = 0; step < steps; ++step) {
      const int left = channels - int(kStep * step);
      const float* at = x + row * pitch + kStep * step;
      split_step<Parts>(some_floats(at, left), some_floats(at + 16, left - 16), out + step_at(row, step, steps),
                        part_bytes);
    }
}

// Columns [count, channels] as tiles [columns / 32, parts, 2, steps, 16 pairs, 16, 2].
inline void split_columns(const float* x, std::ptrdiff_t pitch, int count, int channels, std::uint8_t* out) {
  const std::size_t bytes = kParts * part_bytes_of(kPairRows, steps_of(channels));
  for (int first = 0; first < count; first += kPairRows, out += bytes) {
    split_rows(x + first * pitch, pitch, std::min(kPairRows, count - first), channels, out);
    for (std::size_t at = 0; at < bytes; at += kTileBytes) {
      __m512i rows[kTileRows];
      _Pragma("GCC unroll 16")
      for (int i = 0; i < kTileRows; ++i) rows[i] = _mm512_load_si512(out + at + i * 64);
      transpose(rows);
      _Pragma("GCC unroll 16")
      for (int i = 0; i < kTileRows; ++i) _mm512_store_si512(out + at + i * 64, rows[i]);
    }
  }
}

// A panel of at most 16 columns [channels, columns], rows `pitch` floats apart, as tiles [parts, steps, 16 pairs, 16,
// 2], parts `part_bytes` apart.
template <int Parts>
inline void split_panel(const float* x, std::ptrdiff_t pitch, int columns, int channels, std::size_t part_bytes,
                        std::uint8_t* out) {
  const int pairs = int(steps_of(channels)) * kStep / 2;
  for (int pair = 0; pair < pairs; ++pair) {
    __m512i even[Parts], odd[Parts];
    const auto row = [&](int i) {
      return i < channels ? some_floats(x + i * pitch, columns) : _mm512_setzero_ps();
    };
    split(row(2 * pair), even);
    split(row(2 * pair + 1), odd);
    for (int part = 0; part < Parts; ++part)
      _mm512_store_si512(out + part * part_bytes + pair * 64,
                         _mm512_or_si512(_mm512_srli_epi32(even[part], 16), odd[part]));
  }
}

// Adds to products [32, 16 * Panels], rows `pitch` bytes apart, or begins them. rows: two tiles of each step, the
// second ones behind all of the first, parts `row_part` apart; panels: as many of columns [16 pairs, 16, 2], likewise.
// between: what is done beside each step.
template <int Panels, int Parts = kParts, typename Between>
inline void multiply_parts(const std::uint8_t* rows, std::size_t row_part, const std::uint8_t* panels,
                           std::size_t panel_part, std::size_t steps, bool begin, float* products, std::size_t pitch,
                           Between& between) {
  const std::size_t half = steps * kTileBytes;
  char* out = reinterpret_cast<char*>(products);
  char* lower = out + kTileRows * pitch;
  asm volatile("" ::: "memory");
  if (begin) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, out, pitch);
    _tile_loadd(1, lower, pitch);
    if (Panels == 2) {
      _tile_loadd(2, out + 64, pitch);
      _tile_loadd(3, lower + 64, pitch);
    }
  }
#define ZSAD_ROWS(part)                                                \
  _tile_loadd(4, rows + (part) * row_part + k * kTileBytes, 64);       \
  _tile_loadd(5, rows + (part) * row_part + half + k * kTileBytes, 64);
#define ZSAD_PANELS(part)                                              \
  _tile_loadd(6, panels + (part) * panel_part + k * kTileBytes, 64);   \
  if (Panels == 2) { _tile_loadd(7, panels + (part) * panel_part + half + k * kTileBytes, 64); }
#define ZSAD_MULTIPLY                                                  \
  _tile_dpbf16ps(0, 4, 6);                                             \
  _tile_dpbf16ps(1, 5, 6);                                             \
  if (Panels == 2) {                                                   \
    _tile_dpbf16ps(2, 4, 7);                                           \
    _tile_dpbf16ps(3, 5, 7);                                           \
  }
  for (std::size_t k = 0; k < steps; ++k) {
    between();
    if (Parts == 2) {
      ZSAD_ROWS(1) ZSAD_PANELS(0) ZSAD_MULTIPLY
      ZSAD_ROWS(0) ZSAD_MULTIPLY
      ZSAD_PANELS(1) ZSAD_MULTIPLY
      continue;
    }
    ZSAD_ROWS(0) ZSAD_PANELS(2) ZSAD_MULTIPLY
    ZSAD_PANELS(1) ZSAD_MULTIPLY
    ZSAD_ROWS(1) ZSAD_MULTIPLY
    ZSAD_PANELS(0) ZSAD_MULTIPLY
    ZSAD_ROWS(2) ZSAD_MULTIPLY
    ZSAD_ROWS(0) ZSAD_MULTIPLY
  }
#undef ZSAD_ROWS
#undef ZSAD_PANELS
#undef ZSAD_MULTIPLY
  _tile_stored(0, out, pitch);
  _tile_stored(1, lower, pitch);
  if (Panels == 2) {
    _tile_stored(2, out + 64, pitch);
    _tile_stored(3, lower + 64, pitch);
  }
  asm volatile("" ::: "memory");
}

}  // namespace
}  // namespace zsad
#endif
