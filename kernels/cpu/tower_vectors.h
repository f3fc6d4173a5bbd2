#pragma once
// Vectors as wide as the registers of each instruction set, and the functions of them that a vision transformer takes:
// polynomials, alike everywhere.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__AVX512VNNI__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#define ZSAD_UNROLL _Pragma("GCC unroll 24")
#define ZSAD_INLINE __attribute__((always_inline))

namespace zsad {
namespace {

#if defined(__AVX512VNNI__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
constexpr float kLog2E = 1.44269504f;

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef std::int32_t Ints __attribute__((vector_size(kLanes * 4)));

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

}  // namespace
}  // namespace zsad
