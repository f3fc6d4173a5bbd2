#pragma once
// Rows by panels of 16 outputs, in floats and in 8-bit codes, and how rows become codes. What takes products is given
// kLanes outputs of a row at a time, `finish(row, column, values)`, of rows below `count`.
#include "tower_layout.h"
#include "tower_vectors.h"

#if defined(__AMX_INT8__)
#include "amx.h"
#endif

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace zsad {
namespace {

#if defined(__AVX512VNNI__)
constexpr int kRows = 8, kMaxPanels = 3;
#elif defined(__AVX2__)
constexpr int kRows = 4, kMaxPanels = 1;
#else
constexpr int kRows = 2, kMaxPanels = 1;
#endif
constexpr int kVectors = kColumns / kLanes;  // of a panel

typedef std::uint8_t Code;

template <int Panels>
inline void float_block(const float* x, std::size_t pitch, const float* panel, std::size_t panel_pitch, int depth,
                        float* out) {
  Vec sums[kRows][Panels * kVectors] = {};
  for (int k = 0; k < depth; ++k) {
    Vec b[Panels * kVectors];
    ZSAD_UNROLL
    for (int j = 0; j < Panels * kVectors; ++j)
      b[j] = load(panel + j / kVectors * panel_pitch + std::size_t(k) * kColumns + j % kVectors * kLanes);
    ZSAD_UNROLL
    for (int i = 0; i < kRows; ++i) {
      const Vec a = splat(x[i * pitch + k]);
      ZSAD_UNROLL
      for (int j = 0; j < Panels * kVectors; ++j) sums[i][j] += a * b[j];
    }
  }
  ZSAD_UNROLL
  for (int i = 0; i < kRows; ++i) {
    ZSAD_UNROLL
    for (int j = 0; j < Panels * kVectors; ++j) store(out + i * kMaxPanels * kColumns + j * kLanes, sums[i][j]);
  }
}

// x: [count, depth] in rows `pitch` apart, and room for whole blocks of rows; weights: [panels, depth, 16].
template <typename Finish>
void multiply_floats(const float* x, std::size_t pitch, int count, const float* weights, int depth, int panels,
                     const Finish& finish) {
  const std::size_t panel_pitch = std::size_t(depth) * kColumns;
  alignas(64) float block[kRows * kMaxPanels * kColumns];
  int panel = 0;
  const auto pass = [&](auto width) {
    constexpr int kPanels = width;
    for (int row = 0; row < count; row += kRows) {
      float_block<kPanels>(x + row * pitch, pitch, weights + panel * panel_pitch, panel_pitch, depth, block);
      for (int i = 0; i < std::min(kRows, count - row); ++i)
        for (int j = 0; j < kPanels * kColumns; j += kLanes)
          finish(row + i, panel * kColumns + j, load(block + i * kMaxPanels * kColumns + j));
    }
    panel += kPanels;
  };
  while (panel + kMaxPanels <= panels) pass(std::integral_constant<int, kMaxPanels>());
  while (panel < panels) pass(std::integral_constant<int, 1>());
}

#if defined(__AMX_INT8__)

constexpr int kBlockRows = 32, kBlockPanels = 2;

#define ZSAD_PRODUCT(sums, left, right)          \
  if constexpr (Bf16)                            \
    _tile_dpbf16ps(sums, left, right);           \
  else                                           \
    _tile_dpbusd(sums, left, right);

// 32 rows of 64 * steps bytes, `pitch` bytes apart, with one or two panels; out: rows `stride` bytes apart.
// Bf16: of bfloat16, else bytes without and with sign.
template <bool Bf16, int Panels>
inline void tile_block(const void* rows, std::size_t pitch, const void* panel, std::size_t panel_bytes, int steps,
                       void* out, std::size_t stride) {
  const char *a = static_cast<const char*>(rows), *b = static_cast<const char*>(panel);
  char* to = static_cast<char*>(out);
  asm volatile("" ::: "memory");  // GCC 12 does not know that tiles are loaded from memory
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int k = 0; k < steps; ++k) {
    _tile_loadd(4, a + k * 64, pitch);
    _tile_loadd(5, a + 16 * pitch + k * 64, pitch);
    _tile_loadd(6, b + k * 1024, 64);
    ZSAD_PRODUCT(0, 4, 6)
    ZSAD_PRODUCT(1, 5, 6)
    if (Panels == 2) {
      _tile_loadd(7, b + panel_bytes + k * 1024, 64);
      ZSAD_PRODUCT(2, 4, 7)
      ZSAD_PRODUCT(3, 5, 7)
    }
  }
  _tile_stored(0, to, stride);
  _tile_stored(1, to + 16 * stride, stride);
  if (Panels == 2) {
    _tile_stored(2, to + 64, stride);
    _tile_stored(3, to + 16 * stride + 64, stride);
  }
  asm volatile("" ::: "memory");
}

template <int Panels>
inline void code_block(const Code* x, std::size_t pitch, const std::int8_t* panel, std::size_t panel_bytes,
                       std::int32_t* out) {
  tile_block<false, Panels>(x, pitch, panel, panel_bytes, int(panel_bytes / 1024), out,
                            kBlockPanels * kColumns * sizeof *out);
}

#else

struct Tiles {};

constexpr int kBlockRows = kRows, kBlockPanels = kMaxPanels;

#if defined(__AVX512VNNI__)
using Sums = __m512i;
inline Sums load_columns(const std::int8_t* p) { return _mm512_loadu_si512(p); }
inline void add_products(Sums& sums, std::int32_t quad, Sums right) {
  // Not the intrinsic: GCC 12 then spills the accumulators.
  asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(_mm512_set1_epi32(quad)), "v"(right));
}
#elif defined(__AVX2__)
using Sums = __m256i;
inline Sums load_columns(const std::int8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline void add_products(Sums& sums, std::int32_t quad, Sums right) {
  const __m256i left = _mm256_set1_epi32(quad);  // 128 * 127 * 2 fits 16 bits
  const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(left), _mm256_sign_epi8(right, left));
  sums = _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
#else
struct Sums {
  std::int32_t lane[kLanes];
};
struct Columns {
  const std::int8_t* codes;
};
inline Columns load_columns(const std::int8_t* p) { return {p}; }
inline void add_products(Sums& sums, std::int32_t quad, Columns right) {
  Code left[kCodes];
  std::memcpy(left, &quad, sizeof left);
  for (int lane = 0; lane < kLanes; ++lane)
    for (int c = 0; c < kCodes; ++c) sums.lane[lane] += std::int32_t(left[c]) * right.codes[lane * kCodes + c];
}
#endif

// Calls `pass(panels, first)` with `Most` panels at a time, or with the last ones alone; their number is a constant.
template <int Most, typename Pass>
inline void by_panels(int panels, const Pass& pass) {
  int panel = 0;
  for (; panel + Most <= panels; panel += Most) pass(std::integral_constant<int, Most>(), panel);
  for (; panel < panels; ++panel) pass(std::integral_constant<int, 1>(), panel);
}

// Rows, `pitch` bytes apart, by panels, `panel_pitch` bytes apart, of which `bytes` count. `finish(row, sums)` is given
// the sums of a row.
template <int Rows, int Panels, auto Add = add_products, typename Finish>
ZSAD_INLINE inline void code_products(const Code* x, std::size_t pitch, const std::int8_t* panel,
                                      std::size_t panel_pitch, std::size_t bytes, const Finish& finish) {
  Sums sums[Rows][Panels * kVectors] = {};
  for (std::size_t at = 0; at < bytes; at += kColumns * kCodes, x += kCodes) {
    decltype(load_columns(panel)) b[Panels * kVectors];
    each<Panels * kVectors>([&](auto j) ZSAD_INLINE {
      b[j] = load_columns(panel + j / kVectors * panel_pitch + at + j % kVectors * kLanes * kCodes);
    });
    each<Rows>([&](auto i) ZSAD_INLINE {
      std::int32_t quad;
      std::memcpy(&quad, x + i * pitch, sizeof quad);
      each<Panels * kVectors>([&](auto j) ZSAD_INLINE { Add(sums[i][j], quad, b[j]); });
    });
  }
  each<Rows>([&](auto i) ZSAD_INLINE { finish(i, sums[i]); });
}

template <int Panels>
inline void code_block(const Code* x, std::size_t pitch, const std::int8_t* panel, std::size_t panel_bytes,
                       std::int32_t* out) {
  code_products<kRows, Panels>(x, pitch, panel, panel_bytes, panel_bytes, [&](int i, const auto& sums) ZSAD_INLINE {
    each<Panels * kVectors>([&](auto j) ZSAD_INLINE {
      std::memcpy(out + i * kBlockPanels * kColumns + j * kLanes, &sums[j], kLanes * sizeof *out);
    });
  });
}

#endif

// x: codes [count, panel_bytes / 16] in rows `pitch` apart, with room for whole blocks. `finish` is given the sums as
// floats.
template <typename Finish>
void multiply_codes(const Code* x, std::size_t pitch, int count, const std::int8_t* codes, std::size_t panel_bytes,
                    int panels, const Finish& finish) {
  constexpr int kPitch = kBlockPanels * kColumns;
  alignas(64) std::int32_t block[kBlockRows * kPitch];
  int panel = 0;
  const auto pass = [&](auto width) {
    constexpr int kPanels = width;
    for (int row = 0; row < count; row += kBlockRows) {
      code_block<kPanels>(x + row * pitch, pitch, codes + panel * panel_bytes, panel_bytes, block);
      for (int i = 0; i < std::min(kBlockRows, count - row); ++i)
        for (int j = 0; j < kPanels * kColumns; j += kLanes) {
          Ints sums;
          std::memcpy(&sums, block + i * kPitch + j, sizeof sums);
          finish(row + i, panel * kColumns + j, __builtin_convertvector(sums, Vec));
        }
    }
    panel += kPanels;
  };
  while (panel + kBlockPanels <= panels) pass(std::integral_constant<int, kBlockPanels>());
  while (panel < panels) pass(std::integral_constant<int, 1>());
}

// AVX2 multiplies bytes with sign, others those without.
#if defined(__AVX2__) && !defined(__AVX512VNNI__)
constexpr int kZero = 128;
#else
constexpr int kZero = 0;
#endif

// x [n] becomes low + step * code.
void quantise(const float* x, int n, Code* codes, float& step, float& low) {
  typedef Code Codes __attribute__((vector_size(kLanes)));
  float least = x[0], most = x[0];
  int c = 0;
  if (n >= kLanes) {
    constexpr int kChains = 4;  // of which none waits for the others
    Vec low_lanes[kChains], high_lanes[kChains];
    each<kChains>([&](auto i) ZSAD_INLINE { low_lanes[i] = high_lanes[i] = load(x); });
    for (; c + kChains * kLanes <= n; c += kChains * kLanes)
      each<kChains>([&](auto i) ZSAD_INLINE {
        low_lanes[i] = smaller(low_lanes[i], load(x + c + i * kLanes));
        high_lanes[i] = larger(high_lanes[i], load(x + c + i * kLanes));
      });
    for (; c + kLanes <= n; c += kLanes) {
      low_lanes[0] = smaller(low_lanes[0], load(x + c));
      high_lanes[0] = larger(high_lanes[0], load(x + c));
    }
    each<kChains>([&](auto i) ZSAD_INLINE {
      low_lanes[0] = smaller(low_lanes[0], low_lanes[i]);
      high_lanes[0] = larger(high_lanes[0], high_lanes[i]);
    });
    least = -largest(-low_lanes[0]);
    most = largest(high_lanes[0]);
  }
  for (; c < n; ++c) {
    least = std::min(least, x[c]);
    most = std::max(most, x[c]);
  }
  step = (most - least) / 255.0f;
  const float inverse = step > 0 ? 1.0f / step : 0.0f;
  for (c = 0; c + kLanes <= n; c += kLanes) {
    const Ints rounded = __builtin_convertvector((load(x + c) - least) * inverse + 0.5f, Ints) ^ kZero;
    const Codes some = __builtin_convertvector(rounded, Codes);
    std::memcpy(codes + c, &some, sizeof some);
  }
  for (; c < n; ++c) codes[c] = Code(std::int32_t((x[c] - least) * inverse + 0.5f) ^ kZero);
  low = least + step * kZero;
}

}  // namespace
}  // namespace zsad
