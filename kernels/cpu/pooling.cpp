// Box sums of tokens over the patch grid, their inverse lengths, and optionally the unit features.
//
//   s_r[p, c]     = sum of tokens[., c] over the r x r neighbourhood of p (zero outside the grid)
//   inverse[r, p] = 1 / |s_r[p]|;   unit[r, p, c] = s_r[p, c] * inverse[r, p]
//
// One grid row at a time: vertical sums of that row [columns, C] stay in the second-level cache, the horizontal sum of
// a patch in the first. Compiled once per instruction set (ZSAD_TARGET).
#include "pooling.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <vector>

#define ZSAD_JOIN_(a, b) a##b
#define ZSAD_JOIN(a, b) ZSAD_JOIN_(a, b)

namespace zsad {
namespace {

constexpr std::size_t kLanes = 16;

// out = sum of count rows of n floats that lie `stride` floats apart.
void add_rows(const float* rows, int count, std::size_t stride, std::size_t n, float* __restrict out) {
  std::copy_n(rows, n, out);
  int i = 1;
  for (; i + 1 < count; i += 2) {
    const float *a = rows + i * stride, *b = a + stride;
#pragma omp simd
    for (std::size_t c = 0; c < n; ++c) out[c] += a[c] + b[c];
  }
  if (i < count) {
    const float* a = rows + i * stride;
#pragma omp simd
    for (std::size_t c = 0; c < n; ++c) out[c] += a[c];
  }
}

float squared_length(const float* x, std::size_t n) {
  float lanes[kLanes] = {}, sum = 0.0f;
  std::size_t c = 0;
  for (; c + kLanes <= n; c += kLanes) {
#pragma omp simd
    for (std::size_t i = 0; i < kLanes; ++i) lanes[i] += x[c + i] * x[c + i];
  }
  for (float lane : lanes) sum += lane;
  for (; c < n; ++c) sum += x[c] * x[c];
  return sum;
}

}  // namespace

void ZSAD_JOIN(pooling_, ZSAD_TARGET)(const Pooling& a) {
  const int H = a.rows, W = a.columns;
  const std::size_t C = a.channels, P = std::size_t(H) * W;
  std::vector<float> vertical(W * C), scratch(C);
  for (int r = 0; r < a.degree_count; ++r) {
    const int k = a.degrees[r] / 2;
    for (int y = 0; y < H; ++y) {
      const int top = std::max(y - k, 0), bottom = std::min(y + k, H - 1);
      add_rows(a.tokens + top * W * C, bottom - top + 1, W * C, W * C, vertical.data());
      for (int x = 0; x < W; ++x) {
        const int left = std::max(x - k, 0), right = std::min(x + k, W - 1);
        const std::size_t p = r * P + std::size_t(y) * W + x;
        float* sum = a.unit ? a.unit + p * C : scratch.data();
        add_rows(vertical.data() + left * C, right - left + 1, C, C, sum);
        const float length = std::sqrt(squared_length(sum, C));
        const float inverse = length > a.zero_length ? 1.0f / length : 0.0f;
        a.inverse[p] = inverse;
        if (a.unit) {
#pragma omp simd
          for (std::size_t c = 0; c < C; ++c) sum[c] *= inverse;
        }
      }
    }
  }
}

}  // namespace zsad
