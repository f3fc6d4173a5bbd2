#pragma once
// Attention: what the queries of a head see of its keys and values.
//
// Beside int8 layers (queries and keys without the mean key, which no softmax sees):
//   avx512amx   both products in bfloat16 by tiles, weights rounded to bfloat16
//   avx512vnni  codes of queries, keys (a scale per token), values (per channel) and weights (per query, so fine that
//               rounding changes 1/32 of all weights at most; what is too large for a byte is multiplied beside it)
//   others      fp32
// Beside fp32 layers it is in fp32, and within windows, which have few tokens, everywhere.
#include "float_parts.h"
#include "tower_layers.h"
#include "tower_layout.h"
#include "tower_products.h"
#include "tower_vectors.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace zsad {
namespace {

constexpr float kHidden = -1e30f;

struct Attention {
  int tokens, width;  // of a head
  std::size_t pitch;  // of queries, keys and values
  float scale;        // of queries, for powers of two
};

// The largest logit of a query; hides the keys that are there to fill the last vectors.
inline float top_logit(float* row, int tokens, std::size_t filled) {
  std::fill(row + tokens, row + filled, kHidden);
  Vec most = load(row);
  for (std::size_t t = kLanes; t < filled; t += kLanes) most = larger(most, load(row + t));
  return largest(most);
}

#if defined(__AMX_INT8__)

typedef std::uint16_t Half;

// 16 values rounded to bfloat16.
inline __m256i halves(Vec x) { return (__m256i)_mm512_cvtneps_pbh((__m512)x); }

// Keys [panels of 16, steps, 16 pairs, 16, 2] and values [panels of 16 channels, pairs of tokens, 16, 2] in bfloat16.
struct PackedHead {
  std::size_t key_bytes, bytes;
  int steps, channels;

  explicit PackedHead(const Attention& a)
      : key_bytes(up(a.tokens, 2 * kColumns) * up(a.width, 32) * sizeof(Half)),
        bytes(key_bytes + up(a.tokens, kFill) * up(a.width, 2 * kColumns) * sizeof(Half)),
        steps((a.width + 31) / 32),
        channels(int(up(a.width, kColumns)) / kColumns) {}
};

void pack_head(const Attention& a, const float* keys, const float* values, unsigned char* room) {
  const PackedHead packed(a);
  Half* k = reinterpret_cast<Half*>(room);
  Half* v = reinterpret_cast<Half*>(room + packed.key_bytes);
  const int vectors = (a.width + kLanes - 1) / kLanes;
  const auto part = [&](const float* x, int i) { return (Vec)some_floats(x + i * kLanes, a.width - i * kLanes); };
  Vec mean[kMaxHead / kLanes] = {};
  for (int t = 0; t < a.tokens; ++t)
    for (int i = 0; i < vectors; ++i) mean[i] += part(keys + t * a.pitch, i);
  for (int i = 0; i < vectors; ++i) mean[i] /= float(a.tokens);
  alignas(64) Half row[kMaxHead] = {};
  const __m512i to = _mm512_slli_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), 4);
  for (int t = 0; t < a.tokens; ++t) {
    for (int i = 0; i < vectors; ++i) {
      const Vec key = part(keys + t * a.pitch, i) - mean[i];
      _mm256_store_si256(reinterpret_cast<__m256i*>(row + i * kLanes), halves(key));
    }
    for (int step = 0; step < packed.steps; ++step)
      _mm512_i32scatter_epi32(k + (std::size_t(t / 16 * packed.steps + step) * 256 + t % 16) * 2, to,
                              _mm512_load_si512(row + 32 * step), 4);
  }
  const std::size_t panel = up(a.tokens, kFill) * kColumns;
  for (int t = 0; t < a.tokens; t += 2)
    for (int i = 0; i < vectors; ++i) {
      const __m512i low = _mm512_cvtepu16_epi32(halves(part(values + t * a.pitch, i)));
      const Vec next = t + 1 < a.tokens ? part(values + (t + 1) * a.pitch, i) : Vec{};
      const __m512i high = _mm512_cvtepu16_epi32(halves(next));
      _mm512_storeu_si512(v + i * panel + std::size_t(t / 2) * 32,
                          _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
}

// What `count` queries see, [count, width] in rows `out_pitch` apart.
void attend(const Attention& a, const float* queries, int count, const unsigned char* room, const Scratch& s,
            float* out, std::size_t out_pitch) {
  const During during(s.clock, Part::kAttention);
  const PackedHead packed(a);
  alignas(64) Half q[kQueries][kMaxHead] = {};
  for (int i = 0; i < count; ++i)
    for (int c = 0; c < a.width; c += kLanes)
      _mm256_store_si256(reinterpret_cast<__m256i*>(q[i] + c),
                         halves((Vec)some_floats(queries + i * a.pitch + c, a.width - c) * a.scale));
  float* logits = s.logits.get();
  const std::size_t key_panel = packed.steps * 1024, filled = up(a.tokens, kFill);
  for (int first = 0; first < a.tokens; first += 2 * kColumns)
    tile_block<true, 2>(q, sizeof q[0], room + first / kColumns * key_panel, key_panel, packed.steps, logits + first,
                        s.key_pitch * sizeof(float));
  Half* weights = reinterpret_cast<Half*>(s.weights.get());
  float inverse[kQueries];
  s.clock.turn(Part::kSoftmax);
  for (int i = 0; i < count; ++i) {
    float* row = logits + i * s.key_pitch;
    const float top = top_logit(row, a.tokens, filled);
    Vec total = {};
    for (std::size_t t = 0; t < filled; t += kLanes) {
      const Vec p = power_of_two<4>(load(row + t) - top);
      total += p;
      const __m256bh rounded = _mm512_cvtneps_pbh((__m512)p);
      std::memcpy(weights + i * s.key_pitch + t, &rounded, sizeof rounded);
    }
    inverse[i] = 1.0f / sum(total);
  }
  s.clock.turn(Part::kAttention);
  const unsigned char* values = room + packed.key_bytes;
  const std::size_t value_panel = filled * kColumns * sizeof(Half);
  for (int panel = 0; panel < packed.channels; panel += 2) {
    alignas(64) float mixed[kQueries][2 * kColumns];
    const void* at = values + panel * value_panel;
    tile_block<true, 2>(weights, s.key_pitch * sizeof(Half), at, value_panel, int(filled / 32), mixed,
                        sizeof mixed[0]);
    const int width = std::min(2 * kColumns, a.width - panel * kColumns);
    for (int i = 0; i < count; ++i)
      for (int c = 0; c < width; ++c) out[i * out_pitch + panel * kColumns + c] = mixed[i][c] * inverse[i];
  }
}

#elif defined(__AVX512VNNI__)

// Codes of keys [panels, quads, 16, 4] and values [panels of 16 channels, quads of tokens, 16, 4], their scales, and
// sums of keys' codes. Of every 16 quads of values each fourth comes first, then those behind it, and so on: packing
// leaves weights in that order.
struct PackedHead {
  std::size_t values, scales, sums, value_scales, bytes;

  explicit PackedHead(const Attention& a) {
    const std::size_t keys = up(a.tokens, kColumns), channels = up(a.width, kColumns);
    values = keys * up(a.width, kCodes);
    scales = values + channels * up(a.tokens, kFill);
    sums = scales + keys * sizeof(float);
    value_scales = sums + keys * sizeof(float);
    bytes = up(value_scales + channels * sizeof(float), 64);
  }
};

void pack_head(const Attention& a, const float* keys, const float* values, unsigned char* room) {
  const PackedHead packed(a);
  std::int8_t* k = reinterpret_cast<std::int8_t*>(room);
  std::int8_t* v = reinterpret_cast<std::int8_t*>(room + packed.values);
  float *scales = reinterpret_cast<float*>(room + packed.scales), *sums = reinterpret_cast<float*>(room + packed.sums);
  float* value_scales = reinterpret_cast<float*>(room + packed.value_scales);
  const int vectors = (a.width + kLanes - 1) / kLanes, quads = (a.width + kCodes - 1) / kCodes;
  const auto part = [&](const float* x, int i) { return some_floats(x + i * kLanes, a.width - i * kLanes); };
  Vec mean[kMaxHead / kLanes] = {}, most[kMaxHead / kLanes] = {}, inverse[kMaxHead / kLanes];
  for (int t = 0; t < a.tokens; ++t)
    for (int i = 0; i < vectors; ++i) {
      mean[i] += part(keys + t * a.pitch, i);
      most[i] = larger(most[i], absolute(part(values + t * a.pitch, i)));
    }
  for (int i = 0; i < vectors; ++i) {
    mean[i] /= float(a.tokens);
    inverse[i] = most[i] > 0.0f ? 127.0f / most[i] : 0.0f;
    store(value_scales + i * kLanes, most[i] / 127.0f);
  }
  for (int t = 0; t < int(up(a.tokens, kColumns)); ++t) {
    const float* key = keys + std::min(t, a.tokens - 1) * a.pitch;  // the last one fills up: it tops no logits
    Vec row[kMaxHead / kLanes], most = {};
    for (int i = 0; i < vectors; ++i) {
      row[i] = part(key, i) - mean[i];
      most = larger(most, absolute(row[i]));
    }
    const float top = largest(most), to_codes = top > 0 ? 127.0f / top : 0.0f;
    alignas(64) std::int32_t code[kMaxHead / kCodes];
    __m512i total = _mm512_setzero_si512();
    for (int i = 0; i < vectors; ++i) {
      const __m512i codes = rounded(row[i] * to_codes);
      total = _mm512_add_epi32(total, codes);
      _mm_store_si128(reinterpret_cast<__m128i*>(code + i * kLanes / kCodes), _mm512_cvtepi32_epi8(codes));
    }
    std::int8_t* at = k + std::size_t(t / kColumns) * quads * kColumns * kCodes + t % kColumns * kCodes;
    for (int quad = 0; quad < quads; ++quad) std::memcpy(at + quad * kColumns * kCodes, code + quad, kCodes);
    scales[t] = top / 127.0f;
    sums[t] = float(_mm512_reduce_add_epi32(total));
  }
  const std::size_t panel = up(a.tokens, kFill) * kColumns;
  for (int t = 0; t < a.tokens; t += kCodes)
    for (int i = 0; i < vectors; ++i) {
      __m512i quad = _mm512_setzero_si512();
      for (int j = 0; j < std::min(kCodes, a.tokens - t); ++j) {
        const __m512i codes = rounded(part(values + (t + j) * a.pitch, i) * inverse[i]);
        quad = _mm512_or_si512(quad, _mm512_slli_epi32(_mm512_and_si512(codes, _mm512_set1_epi32(255)), 8 * j));
      }
      const std::size_t place = t / kFill * kFill + t % kColumns * kCodes + t % kFill / kColumns * kCodes;
      _mm512_store_si512(v + i * panel + place * kColumns, quad);
    }
}

constexpr int kMixedPanels = 2;  // of values, multiplied with kRows rows of weights
constexpr int kBlockKeys = 64, kExcessRows = 4, kExcessPanels = 4;
constexpr float kRounded = 1.0f / 32;  // of all weights: what rounding them to bytes changes at most

struct Queries {
  alignas(64) Code codes[kQueries][kMaxHead] = {};
  float steps[kQueries] = {}, zeros[kQueries] = {};  // value = (code + zero) * step
  alignas(64) Vec tops[kQueries];                    // of their logits
};

// Logits [kQueries, tokens] in steps of their queries.
void find_logits(const Attention& a, Queries& q, int count, const unsigned char* room, float* logits,
                 std::size_t pitch) {
  const PackedHead packed(a);
  const std::int8_t* k = reinterpret_cast<const std::int8_t*>(room);
  const float* scales = reinterpret_cast<const float*>(room + packed.scales);
  const float* sums = reinterpret_cast<const float*>(room + packed.sums);
  const std::size_t panel_bytes = up(a.width, kCodes) * kColumns;
  std::fill_n(q.tops, kQueries, splat(kHidden));
  by_panels<kMaxPanels>((a.tokens + kColumns - 1) / kColumns, [&](auto panels, int panel) {
    const int first = panel * kColumns;
    for (int row = 0; row < count; row += kRows)
      code_products<kRows, panels>(
          q.codes[row], kMaxHead, k + panel * panel_bytes, panel_bytes, panel_bytes,
          [&](int i, const auto& products) ZSAD_INLINE {
            float* to = logits + (row + i) * pitch + first;
            const Vec zero = splat(q.zeros[row + i]);
            Vec top = q.tops[row + i];
            each<panels>([&](auto j) ZSAD_INLINE {
              const Vec sum = (Vec)_mm512_cvtepi32_ps(products[j]) + zero * load(sums + first + j * kLanes);
              const Vec logit = sum * load(scales + first + j * kLanes);
              top = larger(top, logit);
              store(to + j * kLanes, logit);
            });
            q.tops[row + i] = top;
          });
  });
}

// Weights of a query's keys in 16 bits, the largest 65535; their sum.
float weigh(const float* logits, float step, float top, std::size_t filled, std::uint16_t* weights) {
  const Vec steps = splat(step), shift = splat(16.0f - top * step);
  const auto weight = [&](std::size_t t) {
    const Vec x = load(logits + t) * steps + shift;
    const Vec whole = (Vec)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    return rounded((Vec)_mm512_scalef_ps((__m512)power_of_fraction<4>(x - whole), (__m512)whole));
  };
  __m512i total = _mm512_setzero_si512();
  for (std::size_t t = 0; t < filled; t += 2 * kLanes) {
    const __m512i first = weight(t), second = weight(t + kLanes);
    total = _mm512_add_epi32(total, _mm512_add_epi32(first, second));
    _mm512_store_si512(weights + t, _mm512_packus_epi32(first, second));
  }
  return _mm512_reduce_add_ps(_mm512_cvtepi32_ps(total));
}

// Weights of a block of keys that bytes do not hold: of each query that has such, what they count in 256.
struct Excess {
  alignas(64) Code codes[kQueries + kExcessRows][kBlockKeys] = {};
  int query[kQueries + kExcessRows] = {};
  int count = 0;
};

// Brings the weights of a block into bytes, `first` keys behind where their rows of 16 bits begin.
void narrow(std::uint16_t* weights, std::size_t pitch, int count, const int* shifts, std::size_t first, int keys,
            Excess& excess) {
  const __m512i byte = _mm512_set1_epi16(255);
  excess.count = 0;
  for (int i = 0; i < count; ++i) {
    std::uint16_t* row = weights + i * pitch;
    Code *low = reinterpret_cast<Code*>(row) + first, *high = excess.codes[excess.count];
    const __m512i half = _mm512_set1_epi16(short((1 << shifts[i]) >> 1));
    const __m128i by = _mm_cvtsi32_si128(shifts[i]);
    const auto shifted = [&](const std::uint16_t* some) ZSAD_INLINE {
      return _mm512_srl_epi16(_mm512_adds_epu16(_mm512_load_si512(some), half), by);
    };
    __m512i all = _mm512_setzero_si512();
    for (int t = 0; t < keys; t += kFill) {
      const __m512i a = shifted(row + first + t), b = shifted(row + first + t + kFill / 2);
      _mm512_store_si512(low + t, _mm512_packus_epi16(_mm512_and_si512(a, byte), _mm512_and_si512(b, byte)));
      _mm512_store_si512(high + t, _mm512_packus_epi16(_mm512_srli_epi16(a, 8), _mm512_srli_epi16(b, 8)));
      all = _mm512_or_si512(all, _mm512_or_si512(a, b));
    }
    excess.query[excess.count] = i;
    excess.count += _mm512_cmpgt_epu16_mask(all, byte) != 0;
  }
}

// What queries see: their weights by the values, [count, width] in rows `out_pitch` apart.
void mix(const Attention& a, std::uint16_t* weights, std::size_t pitch, int count, const float* totals,
         const unsigned char* room, float* out, std::size_t out_pitch) {
  const PackedHead packed(a);
  const std::int8_t* v = reinterpret_cast<const std::int8_t*>(room + packed.values);
  const float* value_scales = reinterpret_cast<const float*>(room + packed.value_scales);
  const std::size_t filled = up(a.tokens, kFill), panel_pitch = filled * kColumns;
  const int panels = (a.width + kColumns - 1) / kColumns;
  int shifts[kQueries] = {};
  for (int i = 0; i < count; ++i)
    while (shifts[i] < 8 && float(a.tokens << shifts[i]) <= totals[i] * kRounded) ++shifts[i];
  alignas(64) float mixed[kQueries][kMaxHead] = {};
  Excess excess;
  for (std::size_t first = 0; first < filled; first += kBlockKeys) {
    const int keys = int(std::min<std::size_t>(kBlockKeys, filled - first));
    narrow(weights, pitch, count, shifts, first, keys, excess);
    for (int row = 0; row < excess.count; row += kExcessRows)
      by_panels<kExcessPanels>(panels, [&](auto some, int panel) {
        code_products<kExcessRows, some>(
            excess.codes[row], kBlockKeys, v + panel * panel_pitch + first * kColumns, panel_pitch, keys * kColumns,
            [&](int i, const auto& sums) ZSAD_INLINE {
              if (row + i >= excess.count) return;
              float* to = mixed[excess.query[row + i]] + panel * kColumns;
              each<some>([&](auto j) ZSAD_INLINE {
                store(to + j * kLanes, load(to + j * kLanes) + (Vec)_mm512_cvtepi32_ps(sums[j]));
              });
            });
      });
  }
  const Code* rows = reinterpret_cast<const Code*>(weights);
  for (int row = 0; row < count; row += kRows)
    by_panels<kMixedPanels>(panels, [&](auto some, int panel) {
      code_products<kRows, some>(
          rows + row * 2 * pitch, 2 * pitch, v + panel * panel_pitch, panel_pitch, panel_pitch,
          [&](int i, const auto& sums) ZSAD_INLINE {
            if (row + i >= count) return;
            const float unit = float(1 << shifts[row + i]) / totals[row + i];
            each<some>([&](auto j) ZSAD_INLINE {
              const int column = (panel + j) * kColumns;
              const Vec all = (Vec)_mm512_cvtepi32_ps(sums[j]) + load(mixed[row + i] + column) * 256.0f;
              store_some(out + (row + i) * out_pitch + column, all * (load(value_scales + column) * unit),
                         a.width - column);
            });
          });
    });
}

void attend(const Attention& a, const float* queries, int count, const unsigned char* room, const Scratch& s,
            float* out, std::size_t out_pitch) {
  const During during(s.clock, Part::kLayout);
  Queries q;
  for (int i = 0; i < count; ++i) {
    float step, low;
    quantise(queries + i * a.pitch, a.width, q.codes[i], step, low);
    step = step > 0 ? step : 1.0f;
    q.zeros[i] = low / step;
    q.steps[i] = step * a.scale;
  }
  s.clock.turn(Part::kAttention);
  float *logits = s.logits.get(), totals[kQueries];
  find_logits(a, q, count, room, logits, s.key_pitch);
  s.clock.turn(Part::kSoftmax);
  std::uint16_t* weights = reinterpret_cast<std::uint16_t*>(s.weights.get());
  const std::size_t filled = up(a.tokens, kFill);
  for (int i = 0; i < count; ++i) {
    float* row = logits + i * s.key_pitch;
    std::fill(row + a.tokens, row + filled, kHidden);
    totals[i] = weigh(row, q.steps[i], largest(q.tops[i]), filled, weights + i * s.key_pitch);
  }
  s.clock.turn(Part::kAttention);
  mix(a, weights, s.key_pitch, count, totals, room, out, out_pitch);
}

#endif

// In fp32 by parts: keys [blocks of 32, parts, 2, steps, 16 pairs, 16, 2] and values [blocks of 32 channels,
// parts, 2, steps of tokens, 16 pairs, 16, 2].
#if defined(__AMX_INT8__)

std::size_t block_bytes(std::size_t steps) { return kParts * 2 * steps * kTileBytes; }

std::size_t blocks_of(int n) { return (n + 2 * kColumns - 1) / (2 * kColumns); }

std::size_t float_key_bytes(const Attention& a) { return blocks_of(a.tokens) * block_bytes(steps_of(a.width)); }

std::size_t float_head_bytes(const Attention& a) {
  return float_key_bytes(a) + blocks_of(a.width) * block_bytes(steps_of(a.tokens));
}

void pack_float_head(const Attention& a, const float* keys, const float* values, unsigned char* room) {
  split_columns(keys, a.pitch, a.tokens, a.width, room);
  room += float_key_bytes(a);
  const std::size_t steps = steps_of(a.tokens);
  for (int c = 0; c < int(blocks_of(a.width)) * 2 * kColumns; c += kColumns)
    split_panel<kParts>(values + std::min(c, a.width), a.pitch, a.width - c, a.tokens, 2 * steps * kTileBytes,
                        room + c / (2 * kColumns) * block_bytes(steps) + c / kColumns % 2 * steps * kTileBytes);
}

void attend_floats(const Attention& a, const float* queries, int count, const unsigned char* room, const Scratch& s,
                   float* out, std::size_t out_pitch) {
  const During during(s.clock, Part::kLayout);
  const std::size_t steps = steps_of(a.width), token_steps = steps_of(a.tokens), filled = token_steps * kStep;
  alignas(64) float q[kQueries][kMaxHead];
  for (int i = 0; i < count; ++i)
    for (int c = 0; c < a.width; ++c) q[i][c] = queries[i * a.pitch + c] * a.scale;
  std::uint8_t* const parts = s.row_parts.get();
  split_rows(q[0], kMaxHead, count, a.width, parts);
  s.clock.turn(Part::kAttention);
  float *logits = s.logits.get(), inverse[kQueries];
  const auto nothing = [] {};
  for (std::size_t block = 0; block < blocks_of(a.tokens); ++block)
    multiply_parts<2>(parts, 2 * steps * kTileBytes, room + block * block_bytes(steps), 2 * steps * kTileBytes, steps,
                      true, logits + block * 2 * kColumns, s.key_pitch * sizeof(float), nothing);
  s.clock.turn(Part::kSoftmax);
  for (int i = 0; i < count; ++i) {
    float* row = logits + i * s.key_pitch;
    const float top = top_logit(row, a.tokens, filled);
    Vec total = {};
    for (std::size_t step = 0; step < token_steps; ++step) {
      const Vec p = power_of_two<5>(load(row + step * kStep) - top);
      const Vec following = power_of_two<5>(load(row + step * kStep + kLanes) - top);
      total += p + following;
      split_step<kParts>((__m512)p, (__m512)following, parts + step_at(i, step, token_steps),
                         2 * token_steps * kTileBytes);
    }
    inverse[i] = 1.0f / sum(total);
  }
  s.clock.turn(Part::kAttention);
  room += float_key_bytes(a);
  for (int c = 0; c < a.width; c += 2 * kColumns, room += block_bytes(token_steps)) {
    alignas(64) float mixed[kQueries][2 * kColumns];
    multiply_parts<2>(parts, 2 * token_steps * kTileBytes, room, 2 * token_steps * kTileBytes, token_steps, true,
                      mixed[0], sizeof mixed[0], nothing);
    for (int i = 0; i < count; ++i)
      for (int j = 0; j < std::min(2 * kColumns, a.width - c); ++j)
        out[i * out_pitch + c + j] = mixed[i][j] * inverse[i];
  }
}

#else

// In fp32: keys [panels, width, 16], values [panels of 16 channels, tokens, 16].
std::size_t float_head_bytes(const Attention& a) {
  return up((up(a.tokens, kColumns) * a.width + up(a.width, kColumns) * a.tokens) * sizeof(float), 64);
}

void pack_float_head(const Attention& a, const float* keys, const float* values, unsigned char* room) {
  float *k = reinterpret_cast<float*>(room), *v = k + up(a.tokens, kColumns) * a.width;
  for (int t = 0; t < a.tokens; ++t) {
    float* at = k + std::size_t(t / kColumns) * a.width * kColumns + t % kColumns;
    for (int c = 0; c < a.width; ++c) at[c * kColumns] = keys[t * a.pitch + c];
    for (int c = 0; c < a.width; ++c)
      v[(std::size_t(c / kColumns) * a.tokens + t) * kColumns + c % kColumns] = values[t * a.pitch + c];
  }
}

void attend_floats(const Attention& a, const float* queries, int count, const unsigned char* room, const Scratch& s,
                   float* out, std::size_t out_pitch) {
  const During during(s.clock, Part::kAttention);
  const float *k = reinterpret_cast<const float*>(room), *v = k + up(a.tokens, kColumns) * a.width;
  const std::size_t filled = up(a.tokens, kLanes);
  alignas(64) float q[kQueries][kMaxHead];
  float inverse[kQueries], *logits = s.logits.get();
  for (int i = 0; i < kQueries; ++i)
    for (int c = 0; c < a.width; ++c) q[i][c] = i < count ? queries[i * a.pitch + c] * a.scale : 0.0f;
  multiply_floats(q[0], kMaxHead, count, k, a.width, int(up(a.tokens, kColumns)) / kColumns,
                  [&](int row, int column, Vec v) { store(logits + row * s.key_pitch + column, v); });
  s.clock.turn(Part::kSoftmax);
  for (int i = 0; i < count; ++i) {
    float* row = logits + i * s.key_pitch;
    const float top = top_logit(row, a.tokens, filled);
    Vec total = {};
    for (std::size_t t = 0; t < filled; t += kLanes) {
      const Vec p = power_of_two<5>(load(row + t) - top);
      total += p;
      store(row + t, p);
    }
    inverse[i] = 1.0f / sum(total);
  }
  s.clock.turn(Part::kAttention);
  multiply_floats(logits, s.key_pitch, count, v, a.tokens, int(up(a.width, kColumns)) / kColumns,
                  [&](int row, int column, Vec v) {
                    const Vec values = v * inverse[row];
                    const int width = std::min(kLanes, a.width - column);
                    if (width > 0) std::memcpy(out + row * out_pitch + column, &values, width * sizeof(float));
                  });
}

#endif

// A head of a window: what the first `count` of its tokens see of all of them, [count, width] in rows `out_pitch`
// apart. rows: of each token its query, with keys and values `apart` floats behind. turned: room for a column of every
// query's channels, [width, queries], and of weights [tokens, queries].
void attend_window(const Attention& a, const float* const* rows, int count, std::size_t apart, float* turned,
                   float* out, std::size_t out_pitch) {
  const int filled = int(up(count, kLanes));
  float* weights = turned + std::size_t(a.width) * filled;
  for (int i = 0; i < count; ++i)
    for (int c = 0; c < a.width; ++c) turned[c * filled + i] = rows[i][c] * a.scale;
  for (int lane = 0; lane < filled; lane += kLanes) {
    Vec top = splat(kHidden), total = {};
    for (int t = 0; t < a.tokens; ++t) {
      const float* key = rows[t] + apart;
      Vec sums[4] = {};
      int c = 0;
      for (; c + 4 <= a.width; c += 4) {
        ZSAD_UNROLL
        for (int j = 0; j < 4; ++j) sums[j] += load(turned + (c + j) * filled + lane) * key[c + j];
      }
      for (; c < a.width; ++c) sums[0] += load(turned + c * filled + lane) * key[c];
      const Vec logits = (sums[0] + sums[1]) + (sums[2] + sums[3]);
      top = larger(top, logits);
      store(weights + t * filled + lane, logits);
    }
    for (int t = 0; t < a.tokens; ++t) {
      const Vec p = power_of_two<5>(load(weights + t * filled + lane) - top);
      total += p;
      store(weights + t * filled + lane, p);
    }
    const Vec inverse = 1.0f / total;
    for (int t = 0; t < a.tokens; ++t)
      store(weights + t * filled + lane, load(weights + t * filled + lane) * inverse);
  }
  for (int i = 0; i < count; ++i) {
    int c = 0;
    for (; c + kLanes <= a.width; c += kLanes) {
      Vec mixed = {};
      for (int t = 0; t < a.tokens; ++t) mixed += load(rows[t] + 2 * apart + c) * weights[t * filled + i];
      store(out + i * out_pitch + c, mixed);
    }
    for (; c < a.width; ++c) {
      float mixed = 0.0f;
      for (int t = 0; t < a.tokens; ++t) mixed += rows[t][2 * apart + c] * weights[t * filled + i];
      out[i * out_pitch + c] = mixed;
    }
  }
}

}  // namespace
}  // namespace zsad
