// A vision transformer's image tower, from pixels to tokens, in fp32 or with 8-bit products.
//
//   x          = patches * weights + positions
//   per block: x += proj(attention(qkv(norm1(x)))),   x += fc2(activation(fc1(norm2(x))))
//   attention  = softmax(q . k / sqrt(d)) * v, per head
//
// A thread takes a tile of tokens through everything between two attentions: what it reads and writes stays in its
// second-level cache, and the threads wait for each other only where all keys and values must be there: twice a block.
// Threads live as long as a call and sleep while they wait. Windows, which wait for nothing, go through all blocks so
// many at a time as make a tile; their first queries, keys and values are those of the image.
//
// Linear layers in int8: weights have a scale per output, activations are low + step * code with both of every token.
// Attention beside int8 layers (queries and keys without the mean key, which no softmax sees):
//   avx512amx   both products in bfloat16 by tiles, weights rounded to bfloat16
//   avx512vnni  codes of queries, keys (a scale per token), values (per channel) and weights (per query, so fine that
//               rounding changes 1/32 of all weights at most; what is too large for a byte is multiplied beside it)
//   others      fp32
// Windows have so few tokens that their attention is in fp32 everywhere. With fp32 layers everything is fp32; on
// avx512amx their products are sums of products of bfloat16 parts (float_parts.h), of two beside int8 layers, where
// avx512vnni multiplies codes of 16 bits.
//
// Instruction sets (ZSAD_TARGET), one translation unit each: as in int8_product.cpp. Where products are 8 bits wide,
// all give the same integers; exp, erf and GELU are polynomials, alike everywhere.
#include "image_tower.h"

#include "buffer.h"
#include "float_parts.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <cstring>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <type_traits>
#include <utility>

#if defined(__AVX512VNNI__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#define ZSAD_JOIN_(a, b) a##b
#define ZSAD_JOIN(a, b) ZSAD_JOIN_(a, b)
#define ZSAD_UNROLL _Pragma("GCC unroll 24")
#define ZSAD_INLINE __attribute__((always_inline))

namespace zsad {
namespace {

#if defined(__AVX512VNNI__)
constexpr int kLanes = 16, kRows = 8, kMaxPanels = 3;
#elif defined(__AVX2__)
constexpr int kLanes = 8, kRows = 4, kMaxPanels = 1;
#else
constexpr int kLanes = 4, kRows = 2, kMaxPanels = 1;
#endif
constexpr int kVectors = kColumns / kLanes;  // of a panel
constexpr int kQueries = 32;                 // whose logits are there at a time
constexpr int kTile = 32;                    // what numbers of rows are filled up to: those of two AMX tiles
#if defined(__AMX_INT8__)
constexpr int kDepth = 1024;  // inputs that are split at a time
#else
constexpr int kParts = 0, kDepth = 0;
#endif
constexpr float kLog2E = 1.44269504f;
constexpr float kHidden = -1e30f;

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef std::int32_t Ints __attribute__((vector_size(kLanes * 4)));
typedef std::uint8_t Code;

inline Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }
inline Vec splat(float x) { return Vec{} + x; }
inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }
inline Vec smaller(Vec a, Vec b) { return a < b ? a : b; }
inline float sum(Vec v) {
  float s = 0.0f;
  for (int i = 0; i < kLanes; ++i) s += v[i];
  return s;
}
inline float largest(Vec v) {
#if defined(__AVX512VNNI__)
  return _mm512_reduce_max_ps((__m512)v);  // with the loop GCC 12 keeps what loops before it gather in memory
#else
  float m = v[0];
  for (int i = 1; i < kLanes; ++i) m = std::max(m, v[i]);
  return m;
#endif
}
// Calls `work` with 0, 1, ... as constants: GCC 12 keeps arrays in registers where their indices are constants from the
// start, not where it unrolls loops first.
template <typename Work, int... I>
ZSAD_INLINE inline void each(const Work& work, std::integer_sequence<int, I...>) {
  (work(std::integral_constant<int, I>()), ...);
}
template <int N, typename Work>
ZSAD_INLINE inline void each(const Work& work) {
  each(work, std::make_integer_sequence<int, N>());
}
constexpr std::size_t up(std::size_t n, std::size_t to) { return (n + to - 1) / to * to; }

// 2^f for f between -0.5 and 0.5, to 3e-6 with degree 4 and 8e-8 with 5.
template <int Degree>
inline Vec power_of_fraction(Vec f) {
  Vec p;
  if constexpr (Degree == 4) {
    p = splat(0.00956051f) * f + 0.05591704f;
    p = p * f + 0.24024981f;
    p = p * f + 0.69312197f;
    p = p * f + 0.99999920f;
  } else {
    p = splat(0.0013266970f) * f + 0.0096754597f;
    p = p * f + 0.0555074262f;
    p = p * f + 0.2402212175f;
    p = p * f + 0.6931469492f;
    p = p * f + 1.0000000710f;
  }
  return p;
}

// 2^x for x up to 126.
template <int Degree>
inline Vec power_of_two(Vec x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23
  x = larger(x, splat(-125.0f));
  const Vec shifted = x + kRound;
  const Ints whole = (Ints)shifted - 0x4B400000;
  return (Vec)((Ints)power_of_fraction<Degree>(x - (shifted - kRound)) + (whole << 23));
}

// x / 2 * (1 + erf(x / sqrt 2)); 2^(-a q(a)) is erfc(a) to 2.5e-7, q fitted on [0, 4].
inline Vec gelu(Vec x) {
  const Vec absolute = x < 0.0f ? -x : x, a = smaller(absolute * 0.70710678f, splat(4.0f));
  Vec q = splat(-2.7396629e-6f) * a + 4.9333241e-5f;
  q = q * a - 3.4906244e-4f;
  q = q * a + 9.9989283e-4f;
  q = q * a + 1.76135148e-3f;
  q = q * a - 2.92226765e-2f;
  q = q * a + 1.48935035e-1f;
  q = q * a + 9.18332338e-1f;
  q = q * a + 1.62791193f;
  const Vec tail = x * 0.5f * power_of_two<5>(-a * q);
  return x < 0.0f ? tail : x - tail;
}
// The same to 5e-5 of the larger of 1 and |x|: what is rounded to codes of 8 bits shows no more.
inline Vec rough_gelu(Vec x) {
  const Vec a = smaller(larger(x, splat(-4.0f)), splat(4.0f)), square = a * a;
  Vec p = splat(-1.3013044e-9f) * square + 1.04196650e-7f;
  p = p * square - 3.65714778e-6f;
  p = p * square + 7.48552350e-5f;
  p = p * square - 1.006491705e-3f;
  p = p * square + 9.505403056e-3f;
  p = p * square - 6.588785103e-2f;
  p = p * square + 0.3986733985f;
  return x * (a * p + 0.5f);
}
inline Vec sigmoid(Vec x) { return 1.0f / (1.0f + power_of_two<5>(smaller(x * -kLog2E, splat(126.0f)))); }

// ---- Products. `finish(row, column, values)` is given kLanes outputs of a row at a time, of rows below `count`.

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

// ---- Attention.

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

// The same in fp32 by parts: keys [blocks of 32, parts, 2, steps, 16 pairs, 16, 2] and values [blocks of 32 channels,
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

// ---- The tower.

// Threads wait here for each other, asleep.
class Barrier {
 public:
  explicit Barrier(int threads) : threads_(threads), waiting_(0), turn_(0) {}
  void wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    const int turn = turn_;
    if (++waiting_ == threads_) {
      waiting_ = 0;
      ++turn_;
      all_.notify_all();
      return;
    }
    all_.wait(lock, [&] { return turn != turn_; });
  }
  // One thread at least has not come yet.
  void go_on_without(int threads) {
    const std::lock_guard<std::mutex> lock(mutex_);
    threads_ -= threads;
  }

 private:
  int threads_, waiting_, turn_;
  std::mutex mutex_;
  std::condition_variable all_;
};

class Forward {
 public:
  Forward(const Tower& tower, const TowerRun& run)
      : t_(tower),
        run_(run),
        tokens_(tower.front + tower.grid * tower.grid),
        head_{tokens_, tower.width / tower.heads, up(3 * tower.width, kColumns),
              kLog2E / std::sqrt(float(tower.width / tower.heads))},
        pitch_(up(tower.width, kColumns)),
        head_bytes_(bytes_of_head()),
        group_(images_at_once()),
        tile_(rows_at_once()),
        tiles_((tokens_ + tile_ - 1) / tile_),
        window_parts_(parts_of_windows()),
        stream_(group_ * tokens_ * pitch_),
        packed_(group_ * tokens_ * head_.pitch),
        heads_(group_ * tower.heads * head_bytes_),
        barrier_(run.threads),
        next_(2 * (run.depth + 1) * ((run.batch + group_ - 1) / group_)) {
    int rows = 0, length = 0;
    for (std::size_t kind = 0; kind < run.windows.size(); ++kind) {
      const Windows& w = run.windows[kind];
      rows = std::max(rows, (w.count + window_parts_[kind] - 1) / window_parts_[kind] * w.length);
      length = std::max(length, w.length);
    }
    rows = int(up(rows, kTile));
    for (int i = 0; i < run.threads; ++i)
      scratch_.push_back(std::make_unique<Scratch>(tower, std::max(tile_, rows), rows, length, run.seconds));
  }

  void run() {
    std::vector<std::thread> others;
    others.reserve(run_.threads);
    try {
      for (int i = 1; i < run_.threads; ++i) others.emplace_back([this, i] { work(*scratch_[i]); });
    } catch (const std::exception&) {  // neither threads nor memory for more, as where the address space is bounded
      barrier_.go_on_without(run_.threads - 1 - int(others.size()));
    }
    work(*scratch_[0]);
    for (std::thread& other : others) other.join();
    if (!run_.seconds) return;
    for (const auto& s : scratch_)
      for (int part = 0; part < kTowerParts; ++part)
        run_.seconds[part] += s->clock.seconds[part] / double(scratch_.size());
  }

 private:
  // Where there are many threads, so many images that each has several tiles.
  int images_at_once() const {
    const int tiles = (tokens_ + 63) / 64;
    return std::clamp((8 * run_.threads + tiles - 1) / tiles, 1, std::max(run_.batch, 1));
  }

  // A tile reads all weights of a block, whose parts in bfloat16 take time of their own; the last threads wait for the
  // others.
  double tile_cost(int rows, int tiles) const {
    return double((tiles + run_.threads - 1) / run_.threads) * (rows + (in_parts() ? 96 : 6));
  }

  int most_rows() const { return (in_parts() ? 8 : 4) * kTile; }

  bool in_parts() const { return kParts && !t_.int8; }

  int rows_at_once() const {
    int best = kTile;
    double least = 0;
    for (int rows = kTile; rows <= most_rows(); rows += kTile) {
      const double cost = tile_cost(rows, group_ * ((tokens_ + rows - 1) / rows));
      if (rows == kTile || cost < least) best = rows, least = cost;
    }
    return best;
  }

  // Of windows of each size: in how many parts an image's go through the blocks, alike for all threads.
  std::vector<int> parts_of_windows() const {
    std::vector<int> parts;
    for (const Windows& w : run_.windows) {
      int best = w.count;
      double least = 0;
      for (int number = 1; number <= w.count; ++number) {
        const int rows = int(up((w.count + number - 1) / number * w.length, kTile));
        const double cost = tile_cost(rows, group_ * number);
        if (rows <= most_rows() && (least == 0 || cost < least)) best = number, least = cost;
      }
      parts.push_back(best);
    }
    return parts;
  }

  std::size_t bytes_of_head() const {
#if defined(__AVX512VNNI__)
    if (t_.int8) return PackedHead(head_).bytes;
#endif
    return float_head_bytes(head_);
  }

  float* row(int image, int token) const { return stream_.get() + (std::size_t(image) * tokens_ + token) * pitch_; }
  float* qkv(int image, int token) const {
    return packed_.get() + (std::size_t(image) * tokens_ + token) * head_.pitch;
  }
  unsigned char* head(int image, int number) const {
    return heads_.get() + (std::size_t(image) * t_.heads + number) * head_bytes_;
  }

  // All threads: calls `work(number)` for the numbers below count, each in one thread, and waits until all are done.
  template <typename Work>
  void share(int& phase, int count, const Scratch& s, const Work& work) {
    for (int i; (i = next_[phase].fetch_add(1)) < count;) work(i);
    ++phase;
    const During during(s.clock, Part::kWaiting);
    barrier_.wait();
  }

  void work(const Scratch& s) {
    [[maybe_unused]] const Tiles tiles;
    const During during(s.clock, Part::kOther);
    int phase = 0;
    for (int first = 0; first < run_.batch; first += group_) {
      const int images = std::min(group_, run_.batch - first);
      share(phase, images * tiles_, s, [&](int i) { embed(first, i / tiles_, i % tiles_ * tile_, s); });
      if (!run_.windows.empty()) take_windows(phase, first, images, s);
      for (int block = 0; block < run_.depth; ++block) {
        share(phase, images * t_.heads, s, [&](int i) { pack(i / t_.heads, i % t_.heads, s); });
        const bool one = run_.only_first && block == run_.depth - 1;
        const int parts = one ? 1 : tiles_;
        share(phase, images * parts, s, [&](int i) {
          pass(first, block, i / parts, i % parts * tile_, one, s);
        });
      }
    }
  }

  void take_windows(int& phase, int first, int images, const Scratch& s) {
    int parts = 0;
    for (int each : window_parts_) parts += each;
    share(phase, images * parts, s, [&](int i) {
      int part = i % parts;
      std::size_t kind = 0;
      while (part >= window_parts_[kind]) part -= window_parts_[kind++];
      const Windows& w = run_.windows[kind];
      const auto start = [&](int number) { return int(std::size_t(w.count) * number / window_parts_[kind]); };
      pass_windows(w, first, i / parts, start(part), start(part + 1), s);
    });
  }

  // An image's windows from `start` until before `end` through all blocks.
  void pass_windows(const Windows& w, int first, int image, int start, int end, const Scratch& s) {
    const int count = end - start, rows = count * w.length, blocks = int(t_.blocks.size());
    const std::int32_t* tokens = w.tokens + std::size_t(start) * w.length;
    float *x = s.stream.get(), *packed = s.packed.get();
    for (int i = 0; i < rows; ++i) std::copy_n(row(image, tokens[i]), pitch_, x + i * pitch_);
    const float** own = s.window_tokens.get();
    for (int i = 0; i < rows; ++i) own[i] = qkv(image, tokens[i]);
    for (int block = 0; block < blocks; ++block) {
      const TowerBlock& b = t_.blocks[block];
      const bool last = block + 1 == blocks;
      const int step = last ? w.length : 1;  // in the last block nobody reads more than the class token
      if (block > 0) {
        project_windows(b, w.length, count, last, s);
        for (int i = 0; i < rows; ++i) own[i] = packed + i * head_.pitch;
      }
      attend_windows(own, w.length, count, last, s);
      const int wanted = rows / step;
      const auto add = [&](int i, int column, Vec v) {
        float* at = x + i * step * pitch_ + column;
        store(at, load(at) + v);
      };
      apply(b.proj, s.x.get(), s.x_pitch, wanted, s, add);
      for (int i = 0; i < wanted; ++i)
        normalise(x + i * step * pitch_, b.norm2, t_.width, t_.eps, s.x.get() + i * s.x_pitch, s.clock);
      feed_forward(b, wanted, s, add);
    }
    float* out = w.out + (std::size_t(first + image) * w.count + start) * t_.width;
    for (int i = 0; i < count; ++i) std::copy_n(x + i * w.length * pitch_, t_.width, out + std::size_t(i) * t_.width);
  }

  // Queries, keys and values of windows. only_first: queries of class tokens alone.
  void project_windows(const TowerBlock& b, int length, int count, bool only_first, const Scratch& s) const {
    const auto some = [&](int first, int last, int step) {
      const int rows = count * length / step;
      for (int i = 0; i < rows; ++i)
        normalise(s.stream.get() + i * step * pitch_, b.norm1, t_.width, t_.eps, s.x.get() + i * s.x_pitch, s.clock);
      float* to = s.packed.get() + first * kColumns;
      apply(part_of(b.qkv, first, last), s.x.get(), s.x_pitch, rows, s,
            [&](int i, int column, Vec v) { store(to + i * step * head_.pitch + column, v); });
    };
    const int panels = b.qkv.outputs / kColumns;
    if (!only_first) return some(0, panels, 1);
    some(0, int(pitch_) / kColumns, length);
    some(t_.width / kColumns, panels, 1);
  }

  void attend_windows(const float* const* rows, int length, int count, bool only_first, const Scratch& s) const {
    const During during(s.clock, Part::kAttention);
    const Attention a{length, head_.width, head_.pitch, head_.scale};
    const float** own = s.head_tokens.get();
    const int queries = only_first ? 1 : length;
    for (int window = 0; window < count; ++window)
      for (int number = 0; number < t_.heads; ++number) {
        for (int i = 0; i < length; ++i) own[i] = rows[window * length + i] + number * a.width;
        attend_window(a, own, queries, t_.width, s.turned.get(),
                      s.x.get() + window * queries * s.x_pitch + number * a.width, s.x_pitch);
      }
  }

  void embed(int first, int image, int start, const Scratch& s) {
    const int count = std::min(tile_, tokens_ - start), side = t_.grid * t_.patch;
    const float* pixels = run_.images + std::size_t(first + image) * 3 * side * side;
    for (int i = 0; i < count; ++i) {
      float* out = s.x.get() + i * s.x_pitch;
      const int p = start + i - t_.front;
      if (p < 0) {
        std::fill_n(out, t_.patches.inputs, 0.0f);
        continue;
      }
      for (int line = 0; line < 3 * t_.patch; ++line) {
        const int y = line / t_.patch * side + p / t_.grid * t_.patch + line % t_.patch;
        std::copy_n(pixels + std::size_t(y) * side + p % t_.grid * t_.patch, t_.patch, out + line * t_.patch);
      }
    }
    apply(t_.patches, s.x.get(), s.x_pitch, count, s,
          [&](int i, int column, Vec v) { store(row(image, start + i) + column, v); });
    for (int i = 0; i < count; ++i) {
      float* x = row(image, start + i);
      const float* position = t_.positions + std::size_t(start + i) * t_.width;
      for (int c = 0; c < t_.width; ++c) x[c] += position[c];
      if (t_.pre_norm.weight) normalise(x, t_.pre_norm, t_.width, t_.eps, x, s.clock);
    }
    if (run_.depth > 0 || !run_.windows.empty()) project(0, image, start, count, s);
  }

  // Queries, keys and values of a block.
  void project(int block, int image, int start, int count, const Scratch& s) {
    const TowerBlock& b = t_.blocks[block];
    for (int i = 0; i < count; ++i)
      normalise(row(image, start + i), b.norm1, t_.width, t_.eps, s.x.get() + i * s.x_pitch, s.clock);
    apply(b.qkv, s.x.get(), s.x_pitch, count, s,
          [&](int i, int column, Vec v) { store(qkv(image, start + i) + column, v); });
    if (!t_.cosine) return;
    const int half = head_.width / 2;
    for (int i = 0; i < count; ++i)
      for (int number = 0; number < 2 * t_.heads; ++number) {  // queries, then keys
        float* x = qkv(image, start + i) + number * head_.width;
        const std::size_t at = std::size_t(start + i) * half;
        for (int c = 0; c < half; ++c) {
          const float a = x[c], b = x[c + half];
          x[c] = a * t_.cosine[at + c] - b * t_.sine[at + c];
          x[c + half] = b * t_.cosine[at + c] + a * t_.sine[at + c];
        }
      }
  }

  void pack(int image, int number, const Scratch& s) {
    const During during(s.clock, Part::kLayout);
    const float *keys = qkv(image, 0) + t_.width + number * head_.width, *values = keys + t_.width;
#if defined(__AVX512VNNI__)
    if (t_.int8) return pack_head(head_, keys, values, head(image, number));
#endif
    pack_float_head(head_, keys, values, head(image, number));
  }

  // A tile through the rest of a block, what is tapped there, and the next block's queries, keys and values.
  void pass(int first, int block, int image, int start, bool one, const Scratch& s) {
    const int count = one ? 1 : std::min(tile_, tokens_ - start);
    const TowerBlock& b = t_.blocks[block];
    for (int number = 0; number < t_.heads; ++number)
      for (int i = 0; i < count; i += kQueries) {
        const float* queries = qkv(image, start + i) + number * head_.width;
        float* out = s.x.get() + i * s.x_pitch + number * head_.width;
        const int rows = std::min(kQueries, count - i);
#if defined(__AVX512VNNI__)
        if (t_.int8) {
          attend(head_, queries, rows, head(image, number), s, out, s.x_pitch);
          continue;
        }
#endif
        attend_floats(head_, queries, rows, head(image, number), s, out, s.x_pitch);
      }
    const auto add = [&](int i, int column, Vec v) {
      float* x = row(image, start + i) + column;
      store(x, load(x) + v);
    };
    apply(b.proj, s.x.get(), s.x_pitch, count, s, add);
    for (int i = 0; i < count; ++i)
      normalise(row(image, start + i), b.norm2, t_.width, t_.eps, s.x.get() + i * s.x_pitch, s.clock);
    feed_forward(b, count, s, add);
    hand_out(first, block, image, start, count, s);
    if (block + 1 < run_.depth) project(block + 1, image, start, count, s);
  }

  template <typename Add>
  void feed_forward(const TowerBlock& b, int count, const Scratch& s, const Add& add) const {
    float* hidden = s.hidden.get();
    const auto activate = [&](auto function) {
      apply(b.fc1, s.x.get(), s.x_pitch, count, s,
            [&](int i, int column, Vec v) { store(hidden + i * s.hidden_pitch + column, function(v)); });
    };
    if (t_.activation == Activation::kGelu) {
      if (b.fc2.codes)
        activate([](Vec v) { return rough_gelu(v); });
      else
        activate([](Vec v) { return gelu(v); });
    }
    if (t_.activation == Activation::kQuickGelu) activate([](Vec v) { return v * sigmoid(v * 1.702f); });
    if (t_.activation == Activation::kSwiGlu) {
      activate([](Vec v) { return v; });
      const int inner = b.fc2.inputs;
      for (int i = 0; i < count; ++i) {
        float* gate = hidden + i * s.hidden_pitch;
        for (int c = 0; c < inner; ++c) gate[c] *= gate[inner + c] / (1.0f + std::exp(-gate[c]));
      }
    }
    apply(b.fc2, hidden, s.hidden_pitch, count, s, add);
  }

  void hand_out(int first, int block, int image, int start, int count, const Scratch& s) const {
    for (const Tap& tap : run_.taps)
      if (tap.block == block)
        for (int i = std::max(0, t_.front - start); i < count; ++i) {
          float* out = tap.out + (first + image) * tap.image + std::size_t(start + i - t_.front) * t_.width;
          if (tap.normed)
            normalise(row(image, start + i), t_.norm, t_.width, t_.eps, out, s.clock);
          else
            std::copy_n(row(image, start + i), t_.width, out);
        }
    if (run_.classes && block == run_.depth - 1 && start == 0)
      std::copy_n(row(image, 0), t_.width, run_.classes + std::size_t(first + image) * t_.width);
  }

  const Tower& t_;
  const TowerRun& run_;
  const int tokens_;
  const Attention head_;
  const std::size_t pitch_, head_bytes_;
  const int group_, tile_, tiles_;
  const std::vector<int> window_parts_;
  const Buffer<float> stream_, packed_;
  const Buffer<unsigned char> heads_;
  Barrier barrier_;
  std::vector<std::atomic<int>> next_;  // of each phase: what no thread has taken
  std::vector<std::unique_ptr<Scratch>> scratch_;
};

}  // namespace

void ZSAD_JOIN(image_tower_, ZSAD_TARGET)(const Tower& tower, const TowerRun& run) { Forward(tower, run).run(); }

}  // namespace zsad
