#pragma once
// How quantised images are multiplied, block by block of left and right patches: what all sums of products share.
//
// Instruction sets (ZSAD_TARGET; one translation unit each, identical integers):
//   avx512amx   tdpbssd multiplies tiles: 16 left patches, transposed to rows of 64 codes, with a panel of 16 right
//               patches, 64 codes at a time. 32 x 32 outputs stay in tiles; Linux has to be asked for them.
//   avx512vnni  vpdpbusd multiplies unsigned with signed bytes: the right codes are taken as code + 128, which the
//               left token's offset, -128 * sum of its codes, undoes. 8 x 48 outputs stay in registers. A group of
//               right panels is copied as code + 128 before all left tokens pass by it.
//   avx2        vpmaddubsw on |right code| and left code with the right one's sign; 127 * 127 * 2 fits 16 bits. About
//               the speed of an fp32 product.
//   portable    plain loops.
//
// The loops over accumulators are unrolled early and have a function of their own, and vpdpbusd is inline assembly,
// since GCC 12 spills the accumulators otherwise, which takes longer than the products.
#include "amx.h"
#include "int8_layout.h"
#include "transpose.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#if defined(__AVX512VNNI__) || defined(__AVX2__)
#include <immintrin.h>
#endif

// Accumulators live in registers only if the loops over them are unrolled early.
#if defined(__GNUC__)
#define ZSAD_UNROLL _Pragma("GCC unroll 16")
#define ZSAD_NOINLINE __attribute__((noinline))
#define ZSAD_INLINE __attribute__((always_inline))
#else
#define ZSAD_UNROLL
#define ZSAD_NOINLINE
#define ZSAD_INLINE
#endif

namespace zsad {
namespace {  // compiled for several instruction sets, of which none may take another's place

// Columns: kLanes right patches x 4 codes. Sums: as many int32 sums. Floats: as many products, scales or terms. Bits of
// `larger` tell which are larger, the lowest one of the first.
#if defined(__AVX512VNNI__)

constexpr int kLanes = 16;
#if defined(__AMX_INT8__)
constexpr int kRows = 2 * kPanel, kMaxPanels = 2;
#else
constexpr int kRows = 8, kMaxPanels = 3;
#endif
using Columns = __m512i;
using Sums = __m512i;
using Floats = __m512;

inline Columns load_columns(const std::int8_t* codes) { return _mm512_loadu_si512(codes); }
inline Sums first_sums(std::int32_t offset) { return _mm512_set1_epi32(offset); }
inline void add_products(Sums& sums, std::int32_t left_quad, Columns right) {
  // Not the intrinsic: GCC 12 then spills the accumulators.
  asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(right), "v"(_mm512_set1_epi32(left_quad)));
}
inline Floats load_floats(const float* values) { return _mm512_loadu_ps(values); }
inline void store_floats(float* out, Floats values) { _mm512_storeu_ps(out, values); }
inline Floats scaled(Sums sums, float left_scale, Floats right_scales, float left_term, Floats right_terms) {
  const __m512 scales = _mm512_mul_ps(_mm512_set1_ps(left_scale), right_scales);
  const __m512 terms = _mm512_add_ps(_mm512_set1_ps(left_term), right_terms);
  return _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums), scales, terms);
}
inline Floats all(float value) { return _mm512_set1_ps(value); }
inline std::uint64_t larger(Floats values, Floats least) { return _mm512_cmp_ps_mask(values, least, _CMP_GT_OQ); }

#elif defined(__AVX2__)

constexpr int kLanes = 8, kRows = 4, kMaxPanels = 1;
using Columns = __m256i;
using Sums = __m256i;
using Floats = __m256;

inline Columns load_columns(const std::int8_t* codes) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
}
inline Sums first_sums(std::int32_t) { return _mm256_setzero_si256(); }
inline void add_products(Sums& sums, std::int32_t left_quad, Columns right) {
  const __m256i pairs =
      _mm256_maddubs_epi16(_mm256_abs_epi8(right), _mm256_sign_epi8(_mm256_set1_epi32(left_quad), right));
  sums = _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
inline Floats load_floats(const float* values) { return _mm256_loadu_ps(values); }
inline void store_floats(float* out, Floats values) { _mm256_storeu_ps(out, values); }
inline Floats scaled(Sums sums, float left_scale, Floats right_scales, float left_term, Floats right_terms) {
  const __m256 scales = _mm256_mul_ps(_mm256_set1_ps(left_scale), right_scales);
  const __m256 terms = _mm256_add_ps(_mm256_set1_ps(left_term), right_terms);
  return _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums), scales, terms);
}
inline Floats all(float value) { return _mm256_set1_ps(value); }
inline std::uint64_t larger(Floats values, Floats least) {
  return unsigned(_mm256_movemask_ps(_mm256_cmp_ps(values, least, _CMP_GT_OQ)));
}

#else

constexpr int kLanes = 16, kRows = 1, kMaxPanels = 1;
using Columns = const std::int8_t*;
struct Sums {
  std::int32_t lane[kLanes];
};
struct Floats {
  float lane[kLanes];
};

inline Columns load_columns(const std::int8_t* codes) { return codes; }
inline Sums first_sums(std::int32_t) { return {}; }
inline void add_products(Sums& sums, std::int32_t left_quad, Columns right) {
  std::int8_t left[kQuad];
  std::memcpy(left, &left_quad, sizeof left);
  for (int lane = 0; lane < kLanes; ++lane)
    for (int c = 0; c < kQuad; ++c) sums.lane[lane] += std::int32_t(left[c]) * right[lane * kQuad + c];
}
inline Floats load_floats(const float* values) {
  Floats loaded;
  std::memcpy(loaded.lane, values, sizeof loaded.lane);
  return loaded;
}
inline void store_floats(float* out, const Floats& values) { std::memcpy(out, values.lane, sizeof values.lane); }
inline Floats scaled(const Sums& sums, float left_scale, const Floats& right_scales, float left_term,
                     const Floats& right_terms) {
  Floats out;
  for (int lane = 0; lane < kLanes; ++lane)
    out.lane[lane] =
        float(sums.lane[lane]) * (left_scale * right_scales.lane[lane]) + (left_term + right_terms.lane[lane]);
  return out;
}
inline Floats all(float value) {
  Floats out;
  for (float& lane : out.lane) lane = value;
  return out;
}
inline std::uint64_t larger(const Floats& values, const Floats& least) {
  std::uint64_t found = 0;
  for (int lane = 0; lane < kLanes; ++lane) found |= std::uint64_t(values.lane[lane] > least.lane[lane]) << lane;
  return found;
}

#endif

constexpr int kVectors = kPanel / kLanes;
constexpr std::size_t kLine = 64;  // bytes

// What most takers of products need not know.
struct AnyRows {
  static constexpr int kMostRows = std::numeric_limits<int>::max();  // left patches that all right ones pass by at once
  void begin(int) {}     // the right image that begins at this column of all is next
  void end(int, int) {}  // all right ones have passed by the left patches from the first number up to the last
};

// Takers of sums of products of codes as they are, but of tiles: take_sums(row, column, sums), those of a left patch
// with kLanes right ones. A row may also be one that fills up a panel.
struct SumRows : AnyRows {};
template <typename Rows>
constexpr bool takes_sums = std::is_base_of_v<SumRows, Rows>;

struct Image {
  const float* scales;
  const float* mean_terms;
  const std::int32_t* offsets;
  const std::int8_t* codes;

  explicit Image(const Int8Image& image)
      : scales(reinterpret_cast<const float*>(image.data)),
        mean_terms(reinterpret_cast<const float*>(image.data + image.layout.mean_terms)),
        offsets(reinterpret_cast<const std::int32_t*>(image.data + image.layout.offsets)),
        codes(reinterpret_cast<const std::int8_t*>(image.data + image.layout.codes)) {}
};

// Scales and mean terms of Vectors * kLanes right patches.
template <int Vectors>
struct Terms {
  Floats scales[Vectors], mean_terms[Vectors];

  Terms(const Image& right, int q) {
    for (int j = 0; j < Vectors; ++j) {
      scales[j] = load_floats(right.scales + q + j * kLanes);
      mean_terms[j] = load_floats(right.mean_terms + q + j * kLanes);
    }
  }
};

#if defined(__AMX_INT8__)

constexpr int kTileQuads = kTileRows;
constexpr std::size_t kTileBytes = kTileQuads * kPanel * kQuad;

// Bytes of a panel whose quads are filled up with zeros to whole tiles.
std::size_t prepared_bytes(const Int8Layout& layout) {
  return (std::size_t(layout.quads) + kTileQuads - 1) / kTileQuads * kTileBytes;
}

// Tiles of left patches are [16 patches, 16 quads]: the transpose of a panel's 16 quads.
const std::int8_t* prepare_rows(const std::int8_t* codes, int panels, const Int8Layout& layout, std::int8_t* room) {
  std::int8_t* tile = room;
  for (int i = 0; i < panels; ++i)
    for (int k = 0; k < layout.quads; k += kTileQuads) {
      __m512i quads[kTileQuads];
      ZSAD_UNROLL
      for (int j = 0; j < kTileQuads; ++j) {
        const bool there = k + j < layout.quads;
        quads[j] = there ? _mm512_loadu_si512(codes) : _mm512_setzero_si512();
        codes += there * kPanel * kQuad;
      }
      transpose(quads);
      ZSAD_UNROLL
      for (int j = 0; j < kTileQuads; ++j, tile += kPanel * kQuad) _mm512_storeu_si512(tile, quads[j]);
    }
  return room;
}
const std::int8_t* prepare_columns(const std::int8_t* codes, int panels, const Int8Layout& layout, std::int8_t* room) {
  const std::size_t bytes = layout.panel_bytes(), prepared = prepared_bytes(layout);
  if (bytes == prepared) return codes;
  for (int j = 0; j < panels; ++j) {
    std::memcpy(room + j * prepared, codes + j * bytes, bytes);
    std::memset(room + j * prepared + bytes, 0, prepared - bytes);
  }
  return room;
}

template <int Panels>
struct TileSums {
  alignas(64) std::int32_t of[kRows][Panels * kPanel];
};

// Sums of products of kRows left patches with Panels panels of right ones. rows, columns: prepared panels of so many
// bytes. between: what vectors do while tiles are multiplied, called once for kTileBytes of them.
template <int Panels, typename Between>
void multiply_tiles(const std::int8_t* rows, const std::int8_t* columns, std::size_t bytes, TileSums<Panels>& sums,
                    Between between) {
  constexpr std::size_t kSumsBytes = sizeof sums.of[0];
  asm volatile("" ::: "memory");  // GCC 12 does not know that tiles are loaded from memory
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (std::size_t k = 0; k < bytes; k += kTileBytes) {
    _tile_loadd(4, rows + k, 64);
    _tile_loadd(5, rows + bytes + k, 64);
    _tile_loadd(6, columns + k, 64);
    _tile_dpbssd(0, 4, 6);
    _tile_dpbssd(1, 5, 6);
    if (Panels == 2) {
      _tile_loadd(7, columns + bytes + k, 64);
      _tile_dpbssd(2, 4, 7);
      _tile_dpbssd(3, 5, 7);
    }
    between();
  }
  _tile_stored(0, sums.of[0], kSumsBytes);
  _tile_stored(1, sums.of[kPanel], kSumsBytes);
  if (Panels == 2) {
    _tile_stored(2, sums.of[0] + kPanel, kSumsBytes);
    _tile_stored(3, sums.of[kPanel] + kPanel, kSumsBytes);
  }
}

// Products of the left patches from p up to `end` with Panels panels of right patches from `panel` on; `out` takes
// those of one left patch after the other. rows, columns: the prepared panels of both; layout: the left one's.
template <int Panels, typename Rows>
void multiply_panels(const Image& left, const Image& right, const Int8Layout& layout, int p, int end, int panel,
                     const std::int8_t* rows, const std::int8_t* columns, Rows& out) {
  const std::size_t bytes = prepared_bytes(layout);
  const Terms<Panels> terms(right, panel * kPanel);
  TileSums<Panels> sums[2];
  const int share = int((kRows * kTileBytes + bytes - 1) / bytes);
  // The panels that come next, of which each turn fetches its share.
  const char* following = reinterpret_cast<const char*>(columns) + Panels * bytes;
  const int lines = int(Panels * (kTileBytes / kLine) * kRows / std::max(kRows, end - p - kRows) + 1);
  multiply_tiles(rows, columns, bytes, sums[0], [] {});
  for (int turn = 0; p < end; p += kRows, turn ^= 1) {
    const int count = std::min(kRows, end - p);
    int i = 0;
    const auto scale = [&](int until) {
      for (; i < until; ++i) {
        Floats products[Panels];
        for (int j = 0; j < Panels; ++j)
          products[j] = scaled(_mm512_load_si512(sums[turn].of[i] + j * kPanel), left.scales[p + i], terms.scales[j],
                               left.mean_terms[p + i], terms.mean_terms[j]);
        out.template take<Panels>(p + i, panel * kPanel, products);
      }
    };
    rows += kRows / kPanel * bytes;
    // Sums are scaled in shares, each beside some of the next ones' tiles: a processor looks only so far ahead.
    if (p + kRows < end)
      multiply_tiles(rows, columns, bytes, sums[turn ^ 1], [&] {
        for (int line = 0; line < lines; ++line, following += kLine) _mm_prefetch(following, _MM_HINT_T1);
        scale(std::min(count, i + share));
      });
    scale(count);
  }
}

#else

struct Tiles {};

std::size_t prepared_bytes(const Int8Layout& layout) { return layout.panel_bytes(); }

const std::int8_t* prepare_rows(const std::int8_t* codes, int, const Int8Layout&, std::int8_t*) { return codes; }
const std::int8_t* prepare_columns(const std::int8_t* codes, int panels, const Int8Layout& layout, std::int8_t* room) {
#if defined(__AVX512VNNI__)
  const std::size_t bytes = panels * layout.panel_bytes();  // read once: codes might lie over the layout
  for (std::size_t i = 0; i < bytes; ++i) room[i] = codes[i] ^ -128;
  return room;
#else
  return codes;
#endif
}

template <int Panels>
struct BlockSums {
  Sums of[kRows][Panels * kVectors];
};

// Sums of products of kRows left patches, whose offsets come first, with Panels panels of right ones: take(i, j, sums),
// those of patch i with the kLanes right ones from j * kLanes on. A function of its own, with nothing else that wants
// registers: GCC 12 then keeps the accumulators in them.
template <int Panels, typename Take>
ZSAD_NOINLINE void sum_products(const std::int32_t* offsets, const std::int8_t* rows, const std::int8_t* columns,
                                std::size_t panel_bytes, int quads, Take take) {
  Sums sums[kRows][Panels * kVectors];
  ZSAD_UNROLL
  for (int i = 0; i < kRows; ++i) {
    ZSAD_UNROLL
    for (int j = 0; j < Panels * kVectors; ++j) sums[i][j] = first_sums(offsets[i]);
  }
  for (int k = 0; k < quads; ++k) {
    Columns b[Panels * kVectors];
    ZSAD_UNROLL
    for (int j = 0; j < Panels * kVectors; ++j)
      b[j] = load_columns(columns + j / kVectors * panel_bytes + j % kVectors * kLanes * kQuad);
    ZSAD_UNROLL
    for (int i = 0; i < kRows; ++i) {
      std::int32_t quad;
      std::memcpy(&quad, rows + i * kQuad, sizeof quad);
      ZSAD_UNROLL
      for (int j = 0; j < Panels * kVectors; ++j) add_products(sums[i][j], quad, b[j]);
    }
    rows += kPanel * kQuad;
    columns += kPanel * kQuad;
  }
  ZSAD_UNROLL
  for (int i = 0; i < kRows; ++i) {
    ZSAD_UNROLL
    for (int j = 0; j < Panels * kVectors; ++j) take(i, j, sums[i][j]);
  }
}

template <int Panels, typename Rows>
void multiply_block(const Image& left, const Image& right, const Int8Layout& layout, int p, int panel,
                    const std::int8_t* rows, const std::int8_t* columns, Rows& out) {
  const auto sum = [&](auto take) {
    sum_products<Panels>(left.offsets + p, rows + p % kPanel * kQuad, columns, layout.panel_bytes(), layout.quads,
                         take);
  };
  if constexpr (takes_sums<Rows>) {
    sum([&out, p, panel](int i, int j, const Sums& sums) ZSAD_INLINE {
      out.take_sums(p + i, panel * kPanel + j * kLanes, sums);
    });
  } else {
    BlockSums<Panels> block;
    sum([&block](int i, int j, const Sums& sums) ZSAD_INLINE { block.of[i][j] = sums; });
    const Terms<Panels * kVectors> terms(right, panel * kPanel);
    for (int i = 0; i < kRows; ++i) {
      if (p + i == layout.patches) return;
      Floats products[Panels * kVectors];
      ZSAD_UNROLL
      for (int j = 0; j < Panels * kVectors; ++j)
        products[j] =
            scaled(block.of[i][j], left.scales[p + i], terms.scales[j], left.mean_terms[p + i], terms.mean_terms[j]);
      out.template take<Panels * kVectors>(p + i, panel * kPanel, products);
    }
  }
}

// Products of the left patches from p up to `end`; `rows` are their prepared panels, from that of p on.
template <int Panels, typename Rows>
void multiply_panels(const Image& left, const Image& right, const Int8Layout& layout, int p, int end, int panel,
                     const std::int8_t* rows, const std::int8_t* columns, Rows& out) {
  const int first = p / kPanel * kPanel;
  for (; p < end; p += kRows)
    multiply_block<Panels>(left, right, layout, p, panel, rows + (p - first) / kPanel * prepared_bytes(layout), columns,
                           out);
}

#endif

// Call pass(panel, panels) for the right panels from `panel` up to `last`, as many at a time as go through at once.
template <typename Pass>
void each_panels(int panel, int last, Pass pass) {
  for (; panel + kMaxPanels <= last; panel += kMaxPanels) pass(panel, std::integral_constant<int, kMaxPanels>());
  for (; panel < last; ++panel) pass(panel, std::integral_constant<int, 1>());
}

// Room for so many prepared panels, on a cache line. Fresh memory would take as long as the products.
inline std::int8_t* prepared_room(const Int8Layout& layout, int panels) {
  static thread_local std::vector<std::int8_t> room;
  room.resize(std::max(room.size(), panels * prepared_bytes(layout) + kLine));
  return room.data() + (-reinterpret_cast<std::uintptr_t>(room.data())) % kLine;
}

// Left patches that stay in the second-level cache while the right panels stream past them.
constexpr std::size_t kBlockBytes = 512 << 10;

// right: the first of so many images of one layout that lie one behind the other. apart: how far from a left patch's
// number those of the right patches go; the blocks are then as high as half of that.
template <typename Rows>
void multiply(const Int8Image& left, const Int8Image& right, int count, int apart, Rows& out) {
  const Image a(left);
  const Int8Layout& layout = left.layout;
  const std::size_t panel_bytes = layout.panel_bytes(), prepared = prepared_bytes(layout);
  const int fitting = int(std::max<std::size_t>(1, kBlockBytes / (2 * prepared))) * 2;  // panels
  const int block = std::min({fitting, apart / (4 * kPanel) * 2 + 2, Rows::kMostRows / kPanel});
  std::int8_t* row_room = prepared_room(layout, block + kMaxPanels);
  std::int8_t* column_room = row_room + block * prepared;
  const Tiles tiles;
  for (int first = 0; first < layout.panels; first += block) {
    const int last = std::min(first + block, layout.panels);
    const std::int8_t* rows = prepare_rows(a.codes + first * panel_bytes, last - first, layout, row_room);
    const int patches = right.layout.patches;
    const int end = std::min(last * kPanel - 1 + std::min(apart, patches), patches - 1) / kPanel + 1;
    for (int image = 0; image < count; ++image) {
      const Image b({right.data + image * right.layout.bytes, right.layout});
      out.begin(image * patches);
      each_panels(std::max(0, first * kPanel - apart) / kPanel, end, [&](int panel, auto panels) {
        const std::int8_t* columns = prepare_columns(b.codes + panel * panel_bytes, panels, layout, column_room);
        multiply_panels<panels>(a, b, layout, first * kPanel, std::min(last * kPanel, layout.patches), panel, rows,
                                columns, out);
      });
    }
    out.end(first * kPanel, std::min(last * kPanel, layout.patches));
  }
}

}  // namespace
}  // namespace zsad
