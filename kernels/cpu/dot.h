#pragma once
#include <cstddef>
#include <cstdint>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#if defined(__GNUC__)
#define ZSAD_PREFETCH(address) __builtin_prefetch(address, 0, 2)  // into the second-level cache, which waits for more
#else
#define ZSAD_PREFETCH(address)
#endif

namespace zsad {
namespace {  // compiled for several instruction sets, of which none may take another's place

// 64 sums side by side, of which none waits for the one before.
struct Sums64 {
  static constexpr std::size_t kCount = 64, kLine = 16;  // floats
#if defined(__AVX512F__)
  __m512 sums[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};

  void add(const float* left, const float* right) {
    for (int i = 0; i < 4; ++i)
      sums[i] = _mm512_fmadd_ps(_mm512_loadu_ps(left + i * kLine), _mm512_loadu_ps(right + i * kLine), sums[i]);
  }
  // right: 16-bit floats, which become the same sums as the floats that they stand for.
  void add(const float* left, const std::uint16_t* right) {
    for (int i = 0; i < 4; ++i) {
      const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(right + i * kLine));
      sums[i] = _mm512_fmadd_ps(_mm512_loadu_ps(left + i * kLine), _mm512_cvtph_ps(halves), sums[i]);
    }
  }
  // As `total` below has it.
  float total() const {
    const __m512 all = _mm512_add_ps(_mm512_add_ps(sums[0], sums[2]), _mm512_add_ps(sums[1], sums[3]));
    const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }
#else
  float sums[kCount] = {};

  void add(const float* left, const float* right) {
#pragma omp simd
    for (std::size_t i = 0; i < kCount; ++i) sums[i] += left[i] * right[i];
  }
  // The upper half is added to the lower one, until one is left.
  float total() {
    for (std::size_t half = kCount / 2; half > 0; half /= 2)
      for (std::size_t i = 0; i < half; ++i) sums[i] += sums[i + half];
    return sums[0];
  }
#endif
};

// The product of two vectors, and meanwhile(c) for each 64 channels; the same sum wherever products are added to sums
// without rounding in between.
template <typename Meanwhile>
inline float dot_beside(const float* left, const float* right, std::size_t channels, Meanwhile meanwhile) {
  Sums64 sums;
  std::size_t c = 0;
  for (; c + Sums64::kCount <= channels; c += Sums64::kCount) {
    meanwhile(c);
    sums.add(left + c, right + c);
  }
  float sum = sums.total();
  for (; c < channels; ++c) sum += left[c] * right[c];
  return sum;
}

inline float dot(const float* left, const float* right, std::size_t channels) {
  return dot_beside(left, right, channels, [](std::size_t) {});
}

// The same while the vector that comes next is fetched.
inline float dot(const float* left, const float* right, const float* next, std::size_t channels) {
  return dot_beside(left, right, channels, [next](std::size_t c) {
    (void)next, (void)c;  // where nothing can be fetched
    for (std::size_t line = 0; line < Sums64::kCount; line += Sums64::kLine) ZSAD_PREFETCH(next + c + line);
  });
}

}  // namespace
}  // namespace zsad
