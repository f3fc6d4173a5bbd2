#pragma once
#if defined(__AVX512F__)
#include <immintrin.h>

namespace zsad {
namespace {  // compiled for several instruction sets, of which none may take another's place

// Quads [16, 16] with rows and columns exchanged.
inline void transpose(__m512i (&rows)[16]) {
  __m512i pairs[16], quads[16];
  _Pragma("GCC unroll 16")
  for (int i = 0; i < 16; i += 2) {
    pairs[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    pairs[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
  _Pragma("GCC unroll 16")
  for (int i = 0; i < 16; i += 4) {
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
