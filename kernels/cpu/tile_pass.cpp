// Filter-and-max pass over one Gram tile.
//
//   S_r[p, q]     = sum of gram over the r x r neighbourhood of p and the r x r neighbourhood of q (zero outside the grid)
//   cos_r[p, q]   = S_r[p, q] * inverse_left[r, p] * inverse_right[r, q]
//   best_left[r, p]  = max over q of cos_r[p, q];   best_right[r, q] = max over p of cos_r[p, q]
//
// A box filter is linear, so the one product serves every degree. The sum over p runs over whole tile rows: vertical
// neighbours are added as the rows stream by and the horizontal ones come from a ring of 2k + 1 such sums, so the
// working set (ring, one filtered row, maxima) stays in L2 and the tile is read 2k + 1 times from the cache that the
// product left it in. The sum over q runs inside one row: shifts by one patch with the grid's edges masked, then
// shifts by one grid row between zero margins.
//
// This file is compiled once per instruction set (ZSAD_TARGET); the loops are plain so that each compiler flag set
// vectorises them its own way.
#include "tile_pass.h"

#include <algorithm>
#include <limits>
#include <memory>
#include <new>
#include <vector>

#define ZSAD_JOIN_(a, b) a##b
#define ZSAD_JOIN(a, b) ZSAD_JOIN_(a, b)

namespace zsad {
namespace {

constexpr std::size_t kAlign = 64;
constexpr int kLanes = 16;

int round_up(int n, int to) { return (n + to - 1) / to * to; }

struct AlignedDelete {
  void operator()(float* p) const { ::operator delete[](p, std::align_val_t(kAlign)); }
};

// Zero-initialised, 64-byte aligned floats.
class Buffer {
 public:
  explicit Buffer(std::size_t n) : data_(static_cast<float*>(::operator new[](n * sizeof(float), std::align_val_t(kAlign)))) {
    std::fill_n(data_.get(), n, 0.0f);
  }
  float* get() const { return data_.get(); }

 private:
  std::unique_ptr<float[], AlignedDelete> data_;
};

// Maxima of one row of cosines: returns the row's maximum over q, folds the row into column_best.
template <int K>
float reduce_row(const float* t, int P, int W, const float* inverse_right, float inverse_left, float* __restrict column_best) {
  float best = -std::numeric_limits<float>::max();
#pragma omp simd reduction(max : best)
  for (int q = 0; q < P; ++q) {
    float s = t[q];
    for (int d = 1; d <= K; ++d) s += t[q - d * W] + t[q + d * W];
    const float right = s * inverse_right[q], left = s * inverse_left;
    best = right > best ? right : best;
    column_best[q] = left > column_best[q] ? left : column_best[q];
  }
  return best * inverse_left;
}

template <int K>
void add_rows(const float* const* rows, int P, float* __restrict out) {
  const float* r[2 * K + 1];
  std::copy_n(rows, 2 * K + 1, r);
#pragma omp simd
  for (int q = 0; q < P; ++q) {
    float s = r[0][q];
    for (int i = 1; i <= 2 * K; ++i) s += r[i][q];
    out[q] = s;
  }
}

// masks: [2K, P]; mask 2d is 0 where the patch d + 1 to the left lies in another grid row, mask 2d + 1 to the right.
template <int K>
void add_horizontal(const float* s, const float* masks, int mask_stride, int P, float* __restrict out) {
#pragma omp simd
  for (int q = 0; q < P; ++q) {
    float sum = s[q];
    for (int d = 0; d < K; ++d) {
      sum += s[q - d - 1] * masks[2 * d * mask_stride + q] + s[q + d + 1] * masks[(2 * d + 1) * mask_stride + q];
    }
    out[q] = sum;
  }
}

struct RowWork {
  int P, W, mask_stride;
  const float* masks;
  float* summed;    // [P] with kMaxReach floats of margin on both sides
  float* filtered;  // [P] with kMaxReach grid rows of zeros on both sides
};

template <int K>
float filter_row(const float* const* rows, const RowWork& w, const float* inverse_right, float inverse_left, float* column_best) {
  add_rows<K>(rows, w.P, w.summed);
  add_horizontal<K>(w.summed, w.masks, w.mask_stride, w.P, w.filtered);
  return reduce_row<K>(w.filtered, w.P, w.W, inverse_right, inverse_left, column_best);
}

using FilterRow = float (*)(const float* const*, const RowWork&, const float*, float, float*);
constexpr FilterRow kFilterRow[kMaxReach + 1] = {nullptr, filter_row<1>, filter_row<2>, filter_row<3>, filter_row<4>};

}  // namespace

void ZSAD_JOIN(tile_pass_, ZSAD_TARGET)(const TilePass& a) {
  const int H = a.rows, W = a.columns, P = H * W, stride = round_up(P, kLanes);
  const int reach = *std::max_element(a.degrees, a.degrees + a.degree_count) / 2;

  Buffer zeros(stride);
  std::vector<Buffer> rings;  // rings[k - 1]: the last 2k + 1 vertical sums of reach k
  for (int k = 1; k <= reach; ++k) rings.emplace_back(std::size_t(2 * k + 1) * stride);
  const auto ring_row = [&](int k, int x) { return rings[k - 1].get() + std::size_t(x % (2 * k + 1)) * stride; };

  Buffer masks(std::size_t(2 * std::max(reach, 1)) * stride);
  for (int d = 0; d < reach; ++d)
    for (int q = 0; q < P; ++q) {
      masks.get()[std::size_t(2 * d) * stride + q] = q % W > d ? 1.0f : 0.0f;
      masks.get()[std::size_t(2 * d + 1) * stride + q] = q % W + d + 1 < W ? 1.0f : 0.0f;
    }
  Buffer summed(stride + 2 * kLanes), filtered(std::size_t(stride) + 2 * kMaxReach * W + 2 * kLanes);
  const RowWork work{P, W, stride, masks.get(), summed.get() + kLanes,
                     filtered.get() + round_up(kMaxReach * W, kLanes)};

  std::fill_n(a.best_right, std::size_t(a.degree_count) * P, -std::numeric_limits<float>::max());
  for (int y = 0; y < H; ++y) {
    const auto gram_row = [&](int yy, int x) {
      return yy < 0 || yy >= H ? zeros.get() : a.gram + (std::ptrdiff_t(yy) * W + x) * a.gram_stride;
    };
    for (int x = 0; x < W + reach; ++x) {
      if (x < W) {
        const float* sum = gram_row(y, x);
        for (int k = 1; k <= reach; ++k) {
          const float* rows[3] = {sum, gram_row(y - k, x), gram_row(y + k, x)};
          add_rows<1>(rows, P, ring_row(k, x));
          sum = ring_row(k, x);
        }
      }
      for (int r = 0; r < a.degree_count; ++r) {
        const int k = a.degrees[r] / 2, centre = x - k;
        if (centre < 0 || centre >= W) continue;
        const int p = y * W + centre;
        const float* inverse_right = a.inverse_right + std::size_t(r) * P;
        const float inverse_left = a.inverse_left[std::size_t(r) * P + p];
        float* column_best = a.best_right + std::size_t(r) * P;
        float& best = a.best_left[std::size_t(r) * P + p];
        if (k == 0) {
          best = reduce_row<0>(gram_row(y, centre), P, W, inverse_right, inverse_left, column_best);
          continue;
        }
        const float* rows[2 * kMaxReach + 1];
        for (int dx = -k; dx <= k; ++dx) {
          rows[dx + k] = centre + dx < 0 || centre + dx >= W ? zeros.get() : ring_row(k, centre + dx);
        }
        best = kFilterRow[k](rows, work, inverse_right, inverse_left, column_best);
      }
    }
  }
  for (std::size_t i = 0; i < std::size_t(a.degree_count) * P; ++i) a.best_right[i] *= a.inverse_right[i];
}

}  // namespace zsad
