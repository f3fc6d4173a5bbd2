#pragma once
// What AMX kernels share: the system's permission to use tiles, and tiles for as long as a kernel runs.

#if defined(__x86_64__) && defined(__linux__)  // how to ask another system is not known
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace zsad {
namespace {  // compiled for several instruction sets, of which none may take another's place

// Whether the processor has tiles, int8 and bfloat16 products of them, and AVX-512 BF16, and Linux has given this
// process leave to use them, which it is asked for here: its threads, present and future, have it from then on.
inline bool may_use_amx() {
  constexpr unsigned kTiles = 13u << 22;  // AMX-BF16, AMX-TILE and AMX-INT8
  constexpr unsigned kBfloat16 = 1u << 5;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kTiles) == kTiles &&
         __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & kBfloat16) != 0 &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

}  // namespace
}  // namespace zsad
#endif

#if defined(__AMX_INT8__)
#include <immintrin.h>

#include <algorithm>
#include <cstdint>

namespace zsad {
namespace {

constexpr int kTileRows = 16;  // of 64 bytes

// The processor's tiles, all of 16 rows of 64 bytes, for as long as this lives.
class Tiles {
 public:
  Tiles() {
    struct alignas(64) {
      std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
      std::uint16_t row_bytes[16] = {};
      std::uint8_t rows[16] = {};
    } shape;
    std::fill_n(shape.row_bytes, 8, std::uint16_t(64));
    std::fill_n(shape.rows, 8, std::uint8_t(16));
    _tile_loadconfig(&shape);
  }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

// Quads [16, 16] with rows and columns exchanged.
inline void transpose(__m512i (&rows)[kTileRows]) {
  __m512i pairs[kTileRows], quads[kTileRows];
  _Pragma("GCC unroll 16")
  for (int i = 0; i < kTileRows; i += 2) {
    pairs[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    pairs[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
  _Pragma("GCC unroll 16")
  for (int i = 0; i < kTileRows; i += 4) {
    quads[i] = _mm512_unpacklo_epi64(pairs[i], pairs[i + 2]);
    quads[i + 1] = _mm512_unpackhi_epi64(pairs[i], pairs[i + 2]);
    quads[i + 2] = _mm512_unpacklo_epi64(pairs[i + 1], pairs[i + 3]);
    quads[i + 3] = _mm512_unpackhi_epi64(pairs[i + 1], pairs[i + 3]);
  }
  _Pragma("GCC unroll 16")
  for (int j = 0; j < 4; ++j) {  // lane l of quads[4 i + j] is column 4 l + j of rows 4 i ... 4 i + 3
    const __m512i even_above = _mm512_shuffle_i32x4(quads[j], quads[4 + j], 0x88);
    const __m512i even_below = _mm512_shuffle_i32x4(quads[8 + j], quads[12 + j], 0x88);
    const __m512i odd_above = _mm512_shuffle_i32x4(quads[j], quads[4 + j], 0xdd);
    const __m512i odd_below = _mm512_shuffle_i32x4(quads[8 + j], quads[12 + j], 0xdd);
    rows[j] = _mm512_shuffle_i32x4(even_above, even_below, 0x88);
    rows[4 + j] = _mm512_shuffle_i32x4(odd_above, odd_below, 0x88);
    rows[8 + j] = _mm512_shuffle_i32x4(even_above, even_below, 0xdd);
    rows[12 + j] = _mm512_shuffle_i32x4(odd_above, odd_below, 0xdd);
  }
}

}  // namespace
}  // namespace zsad
#endif
