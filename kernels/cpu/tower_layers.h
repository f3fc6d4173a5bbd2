#pragma once
// What is applied to each token by itself, linear layers and norms, and what a thread works with.
//
// Linear layers in int8: weights have a scale per output, activations are low + step * code with both of every token.
// Those in fp32 are sums of products of bfloat16 parts on avx512amx (float_parts.h), of two beside int8 layers, where
// avx512vnni multiplies codes of 16 bits.
#include "buffer.h"
#include "float_parts.h"
#include "tower_layout.h"
#include "tower_products.h"
#include "tower_vectors.h"

#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <utility>

namespace zsad {
namespace {

constexpr int kQueries = 32;  // whose logits are there at a time
constexpr int kTile = 32;     // what numbers of rows are filled up to: those of two AMX tiles
#if defined(__AMX_INT8__)
constexpr int kDepth = 1024;  // inputs that are split at a time
#else
constexpr int kParts = 0, kDepth = 0;
#endif

// What a thread spends its time on, where somebody asks.
class Clock {
 public:
  explicit Clock(bool wanted) : wanted_(wanted), since_(now()) {}
  // Returns what it was until now.
  Part turn(Part part) {
    if (wanted_) {
      const double until = now();
      seconds[int(part_)] += until - since_;
      since_ = until;
    }
    std::swap(part, part_);
    return part;
  }
  std::array<double, kTowerParts> seconds{};

 private:
  static double now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
  }
  const bool wanted_;
  double since_;
  Part part_ = Part::kWaiting;
};

// Counts the time of a scope to a part.
class During {
 public:
  During(Clock& clock, Part part) : clock_(clock), before_(clock.turn(part)) {}
  ~During() { clock_.turn(before_); }
  During(const During&) = delete;

 private:
  Clock& clock_;
  const Part before_;
};

// What a thread works with, beside the tile's tokens.
struct Scratch {
  mutable Clock clock;
  const bool int8;
  std::size_t x_pitch, hidden_pitch, code_pitch, key_pitch;
  Buffer<float> x, hidden, logits;
  Buffer<Code> codes, weights;
  Buffer<float> steps, lows;

  Buffer<float> stream, packed, turned;             // of windows
  Buffer<const float*> window_tokens, head_tokens;  // where their queries begin, and those of a window's head
  Buffer<Code> row_parts, panel_parts;   // in bfloat16
  Buffer<float> sums;

  Scratch(const Tower& t, int tile, int window_rows, int window_length, bool clocked)
      : clock(clocked),
        int8(t.int8),
        x_pitch(up(std::max(t.width, t.patches.inputs), kColumns) + kColumns),
        hidden_pitch(widest(t) + kColumns),
        code_pitch(up(std::max({t.width, t.patches.inputs, int(widest(t))}), kFill) + kFill),
        key_pitch(up(t.front + t.grid * t.grid, kFill) + kFill),
        x(tile * x_pitch),
        hidden(tile * hidden_pitch),
        logits(kQueries * key_pitch),
        codes(2 * tile * code_pitch),  // of 16 bits too
        weights(2 * kQueries * key_pitch),
        steps(tile),
        lows(tile),
        stream(window_rows * up(t.width, kColumns)),
        packed(window_rows * up(3 * t.width, kColumns)),
        turned(up(window_length, kLanes) * (t.width / t.heads + window_length)),
        window_tokens(window_rows),
        head_tokens(window_length),
        row_parts(std::size_t(kParts) * std::max(up(tile, kTile) * kDepth, kParts ? kQueries * key_pitch : 0) * 2),
        panel_parts(std::size_t(kParts) * 2 * kColumns * kDepth * 2),
        sums(kParts ? sums_at_once(t, up(tile, kTile)) : up(tile, kTile) * kMaxPanels * kColumns) {}

 private:
  static std::size_t widest(const Tower& t) {
    std::size_t most = t.width;
    for (const TowerBlock& block : t.blocks) most = std::max<std::size_t>(most, block.fc1.outputs);
    return up(most, kColumns);
  }

  // Layers whose inputs are split in several turns keep all their sums; others those of one block.
  static std::size_t sums_at_once(const Tower& t, std::size_t rows) {
    std::size_t most = kTile;
    const auto take = [&](const Linear& layer) {
      if (layer.weights && layer.inputs > kDepth) most = std::max(most, rows * ((layer.outputs + 31) / 32));
    };
    take(t.patches);
    for (const TowerBlock& b : t.blocks)
      for (const Linear* layer : {&b.qkv, &b.proj, &b.fc1, &b.fc2}) take(*layer);
    return most * 2 * kColumns;
  }
};

#if defined(__AMX_INT8__)

// Weights that are fetched into the second-level cache, some at each step of the products before theirs: processors
// come late for what is split in so short a time.
struct Ahead {
  const float* panel;
  std::size_t pitch;  // from one panel to the next
  int inputs, panels, lines, at = 0;

  void operator()() {
    for (int i = 0; i < lines && panels > 0; ++i) {
      _mm_prefetch(reinterpret_cast<const char*>(panel + at * kColumns), _MM_HINT_T1);
      if (++at < inputs) continue;
      at = 0;
      panel += pitch;
      --panels;
    }
  }
};

// As multiply_floats, by products of parts, so many inputs at a time as fit the second-level cache.
template <int Parts, typename Finish>
void multiply_split(const float* x, std::size_t pitch, int count, const Linear& layer, const Scratch& s,
                    const Finish& finish) {
  const int depth = layer.inputs, panels = layer.outputs / kColumns, chunks = (depth + kDepth - 1) / kDepth;
  const int most = int(up((depth + chunks - 1) / chunks, 32));
  for (int from = 0; from < depth; from += most) {
    const int inputs = std::min(most, depth - from), steps = int(steps_of(inputs));
    const std::size_t row_part = part_bytes_of(count, steps), panel_part = 2 * steps * kTileBytes;
    s.clock.turn(Part::kLayout);
    split_rows<Parts>(x + from, pitch, count, inputs, s.row_parts.get());
    for (int panel = 0; panel < panels; panel += 2) {
      const int some = std::min(2, panels - panel);
      s.clock.turn(Part::kLayout);
      for (int i = 0; i < some; ++i)
        split_panel<Parts>(layer.weights + (std::size_t(panel + i) * depth + from) * kColumns, kColumns, kColumns,
                           inputs, panel_part, s.panel_parts.get() + i * steps * kTileBytes);
      s.clock.turn(Part::kLinear);
      const int blocks = (count + kTile - 1) / kTile, next = std::min(2, panels - panel - 2);
      Ahead ahead{layer.weights + (std::size_t(panel + 2) * depth + from) * kColumns, std::size_t(depth) * kColumns,
                  inputs, next, (2 * inputs + blocks * steps - 1) / (blocks * steps)};
      for (int row = 0; row < count; row += kTile) {
        const Code* rows = s.row_parts.get() + row / kTileRows * steps * kTileBytes;
        float* sums = s.sums.get();
        if (chunks > 1) sums += (std::size_t(panel / 2) * blocks + row / kTile) * kTile * 2 * kColumns;
        const std::size_t bytes = 2 * kColumns * sizeof(float);  // of a row of sums
        const auto multiply = some == 2 ? multiply_parts<2, Parts, Ahead> : multiply_parts<1, Parts, Ahead>;
        multiply(rows, row_part, s.panel_parts.get(), panel_part, steps, from == 0, sums, bytes, ahead);
        if (from + most < depth) continue;
        for (int i = 0; i < std::min(kTile, count - row); ++i)
          for (int j = 0; j < some * kColumns; j += kLanes)
            finish(row + i, panel * kColumns + j, load(sums + i * 2 * kColumns + j));
      }
    }
  }
}

#elif defined(__AVX512VNNI__)

// Layers that int8 towers keep exact take codes of 16 bits: 15 of an activation, 12 of a weight, so that sums over so
// many inputs fit 32 bits.
constexpr int kPairInputs = 64;
constexpr float kLeftCodes = 16383.0f, kRightCodes = 2047.0f;

inline void add_pairs(Sums& sums, std::int32_t pair, Sums right) {
  asm("vpdpwssd %2, %1, %0" : "+v"(sums) : "v"(_mm512_set1_epi32(pair)), "v"(right));
}

// At most 16 floats, zeros behind them.
inline Vec some_floats(const float* x, int count) {
  return (Vec)_mm512_maskz_loadu_ps(__mmask16(count < 16 ? (1u << count) - 1 : 0xFFFF), x);
}
inline void store_some(float* to, Vec x, int count) {
  _mm512_mask_storeu_ps(to, __mmask16(count < 16 ? (1u << count) - 1 : 0xFFFF), (__m512)x);
}
inline __m512i rounded(Vec x) { return _mm512_cvtps_epi32((__m512)x); }
inline Vec absolute(Vec x) { return (Vec)_mm512_abs_ps((__m512)x); }

// x [n] becomes step * code, also some floats behind it; returns the step.
float code_row(const float* x, int n, std::int16_t* codes) {
  Vec most = {};
  for (int c = 0; c < n; c += kLanes) most = larger(most, absolute(some_floats(x + c, n - c)));
  const float step = largest(most) / kLeftCodes, inverse = step > 0 ? 1.0f / step : 0.0f;
  for (int c = 0; c < n; c += kLanes)
    _mm256_store_si256(reinterpret_cast<__m256i*>(codes + c),
                       _mm512_cvtsepi32_epi16(rounded(some_floats(x + c, n - c) * inverse)));
  return step;
}

// Weights [inputs, 16] become codes [pairs, 16, 2] with a step for each column; returns the steps.
Vec code_columns(const float* weights, int inputs, std::int16_t* codes) {
  Vec most = {};
  for (int k = 0; k < inputs; ++k) most = larger(most, absolute(load(weights + k * kColumns)));
  const Vec inverse = most > 0.0f ? kRightCodes / most : 0.0f;
  for (int k = 0; k < inputs; k += 2) {
    const __m512i even = rounded(load(weights + k * kColumns) * inverse);
    const __m512i odd = k + 1 < inputs ? rounded(load(weights + (k + 1) * kColumns) * inverse) : __m512i{};
    _mm512_store_si512(codes + k * kColumns, _mm512_mask_blend_epi16(0xAAAAAAAA, even, _mm512_slli_epi32(odd, 16)));
  }
  return most / kRightCodes;
}

// As multiply_floats, by these codes.
template <typename Finish>
void multiply_pairs(const float* x, std::size_t pitch, int count, const Linear& layer, const Scratch& s,
                    const Finish& finish) {
  const int depth = layer.inputs;
  const std::size_t row_bytes = 2 * s.code_pitch;
  Code* rows = s.codes.get();
  s.clock.turn(Part::kLayout);
  for (int i = 0; i < count; ++i)
    s.steps.get()[i] = code_row(x + i * pitch, depth, reinterpret_cast<std::int16_t*>(rows + i * row_bytes));
  s.clock.turn(Part::kLinear);
  by_panels<kMaxPanels>(layer.outputs / kColumns, [&](auto panels, int panel) {
    alignas(64) std::int16_t columns[panels][kPairInputs * kColumns];
    float* sums = s.sums.get();
    std::fill_n(sums, up(count, kRows) * panels * kColumns, 0.0f);
    for (int from = 0; from < depth; from += kPairInputs) {
      const int inputs = std::min(kPairInputs, depth - from);
      Vec steps[panels];
      each<panels>([&](auto j) ZSAD_INLINE {
        steps[j] = code_columns(layer.weights + (std::size_t(panel + j) * depth + from) * kColumns, inputs, columns[j]);
      });
      for (int row = 0; row < count; row += kRows)
        code_products<kRows, panels, add_pairs>(
            rows + row * row_bytes + from * 2, row_bytes, reinterpret_cast<const std::int8_t*>(columns),
            sizeof columns[0], up(inputs, 2) * 2 * kColumns, [&](int i, const auto& products) ZSAD_INLINE {
              float* to = sums + (row + i) * panels * kColumns;
              each<panels>([&](auto j) ZSAD_INLINE {
                store(to + j * kLanes, load(to + j * kLanes) + (Vec)_mm512_cvtepi32_ps(products[j]) * steps[j]);
              });
            });
    }
    for (int i = 0; i < count; ++i)
      for (int j = 0; j < panels; ++j)
        finish(i, (panel + j) * kColumns, load(sums + (i * panels + j) * kColumns) * s.steps.get()[i]);
  });
}

#endif

template <typename Finish>
void apply(const Linear& layer, const float* x, std::size_t pitch, int count, const Scratch& s, const Finish& finish) {
  const int panels = layer.outputs / kColumns;
  const During during(s.clock, Part::kLinear);
  if (layer.weights) {
    const auto add = [&](int row, int column, Vec v) { finish(row, column, v + load(layer.bias + column)); };
#if defined(__AMX_INT8__)
    // Beside layers of 8 bits fewer do.
    const auto multiply = s.int8 ? multiply_split<2, decltype(add)> : multiply_split<kParts, decltype(add)>;
    multiply(x, pitch, count, layer, s, add);
#else
#if defined(__AVX512VNNI__)
    if (s.int8) return multiply_pairs(x, pitch, count, layer, s, add);
#endif
    multiply_floats(x, pitch, count, layer.weights, layer.inputs, panels, add);
#endif
    return;
  }
  s.clock.turn(Part::kLayout);
  for (int i = 0; i < count; ++i)
    quantise(x + i * pitch, layer.inputs, s.codes.get() + i * s.code_pitch, s.steps.get()[i], s.lows.get()[i]);
  s.clock.turn(Part::kLinear);
  multiply_codes(s.codes.get(), s.code_pitch, count, layer.codes, up(layer.inputs, kFill) * kColumns, panels,
                 [&](int row, int column, Vec v) {
                   const Vec low = load(layer.sums + column) * s.lows.get()[row] + load(layer.bias + column);
                   finish(row, column, v * (load(layer.scales + column) * s.steps.get()[row]) + low);
                 });
}

void normalise(const float* x, const Norm& norm, int width, float eps, float* out, Clock& clock) {
  const During during(clock, Part::kNormalisation);
  float total = 0.0f, squares = 0.0f;
#pragma omp simd reduction(+ : total)
  for (int c = 0; c < width; ++c) total += x[c];
  const float mean = total / float(width);
#pragma omp simd reduction(+ : squares)
  for (int c = 0; c < width; ++c) squares += (x[c] - mean) * (x[c] - mean);
  const float inverse = 1.0f / std::sqrt(squares / float(width) + eps);
#pragma omp simd
  for (int c = 0; c < width; ++c) out[c] = (x[c] - mean) * inverse * norm.weight[c] + norm.bias[c];
}

// The panels of a linear layer from `first` until before `last`.
Linear part_of(const Linear& layer, int first, int last) {
  Linear part = layer;
  const std::size_t columns = std::size_t(first) * kColumns;
  part.outputs = (last - first) * kColumns;
  part.bias += columns;
  if (part.weights) {
    part.weights += columns * layer.inputs;
    return part;
  }
  part.codes += columns * up(layer.inputs, kFill);
  part.scales += columns;
  part.sums += columns;
  return part;
}

}  // namespace
}  // namespace zsad
