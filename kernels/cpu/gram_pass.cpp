// Filter-and-max pass over one Gram.
//
//   S_r[p, q] = sum of gram over the r x r neighbourhoods of p and of q (zero outside the grid)
//   cos_r[p, q] = S_r[p, q] * inverse_left[r, p] * inverse_right[r, q]
//   best_left[r, p] = max over q of cos_r[p, q];   best_right[r, q] = max over p of cos_r[p, q]
//
// with a window over q near p and over p near q only; the sums are the same.
//
// Shapes and types of the arguments: gram_pass.h.
//
// A box filter is linear, so the one product serves every degree. The sum over p runs over whole rows of the Gram:
// vertical neighbours are added as they stream by and the horizontal ones come from a ring of 2k + 1 such sums, so the
// working set (ring, one filtered row, maxima) stays in L2 and the Gram is read 2k + 1 times from the cache that the
// product left it in. The sum over q runs inside one row: shifts by one patch with the grid's edges masked, then
// shifts by one grid row between zero margins.
//
// Keys: where the caller also wants to know which patch won, the candidates carry their patch number in the lowest bits
// of the mantissa while the maxima are taken (one logical operation per candidate), see gram_pass.h.
//
// A Gram of 8-bit products is approximate anyway: its pass has 16 bits where they are enough (narrow_pass.h).
//
// This file is compiled once per instruction set (ZSAD_TARGET); the loops are plain so that each compiler flag set
// vectorises them its own way.
//
// 3.5 ms at P = 1369, degrees 1, 3, 5, on one Zen 4 core, with keys the same. Without the overlapping whole vectors
// that take the place of remainders it is 4.2 ms, and with keys 7.9 ms.
#include "gram_pass.h"

#include "buffer.h"
#include "keys.h"
#include "narrow_pass.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#define ZSAD_JOIN_(a, b) a##b
#define ZSAD_JOIN(a, b) ZSAD_JOIN_(a, b)

namespace zsad {
namespace {

constexpr int kLanes = 16;

int round_up(int n, int to) { return (n + to - 1) / to * to; }

// Patches [first, last).
struct Span {
  int first, last;
};

// Runs of q that cover a span in whole vectors: the last one overlaps its neighbour instead of leaving a remainder, so
// the loop bodies must bear being run twice.
struct Runs {
  Span run[2];
  explicit Runs(Span q)
      : Runs(q, q.last - q.first, (q.last - q.first) / kLanes * kLanes) {}
  Runs(Span q, int count, int whole)
      : run{{q.first, count < kLanes ? q.last : q.first + whole},
            {count < kLanes || count == whole ? q.last : q.last - kLanes, q.last}} {}
  const Span* begin() const { return run; }
  const Span* end() const { return run + 2; }
};

// The right patches that a left one meets: those of some grid rows and columns.
struct Window {
  Span rows, columns;

  Window(int y, int x, int reach, int H, int W)
      : rows{std::max(y - reach, 0), std::min(y + reach + 1, H)},
        columns{std::max(x - reach, 0), std::min(x + reach + 1, W)} {}
};

// The patches of all grid rows that are at most `reach` away from some rows.
Span patches_near(Span rows, int reach, int H, int W) {
  return {std::max(rows.first - reach, 0) * W, std::min(rows.last + reach, H) * W};
}

// One row of sums over p, on its way to the maxima.
struct Row {
  Window window;
  std::uint32_t index;  // the left patch p
  float inverse_left;
  const float* inverse_right;
  float* best_left;    // of p, out
  float* column_best;  // [P]; with keys cosine - 1 and p, else still without the right side's inverse lengths
};

template <int K, bool Keys>
float reduce_span(const float* t, int W, std::uint32_t index_mask, const Row& row, Span span, float best) {
  const float* inverse_right = row.inverse_right;
  const float inverse_left = row.inverse_left;
  const std::uint32_t index = row.index;
  float* __restrict column_best = row.column_best;
#pragma omp simd reduction(max : best)
  for (int q = span.first; q < span.last; ++q) {
    float s = t[q];
    for (int d = 1; d <= K; ++d) s += t[q - d * W] + t[q + d * W];
    float left = s * inverse_left, right = s * inverse_right[q];
    if (Keys) {
      const float below_one = left * inverse_right[q] - 1.0f;
      right = with_index(below_one, index_mask, std::uint32_t(q));
      left = with_index(below_one, index_mask, index);
    }
    best = right > best ? right : best;
    column_best[q] = left > column_best[q] ? left : column_best[q];
  }
  return best;
}

template <int K, bool Keys>
void reduce_row(const float* t, int W, std::uint32_t index_mask, const Row& row) {
  const auto [rows, columns] = row.window;
  float best = -std::numeric_limits<float>::max();
  const auto reduce = [&](Span span) { best = reduce_span<K, Keys>(t, W, index_mask, row, span, best); };
  if (columns.last - columns.first == W) {
    for (const Span& run : Runs({rows.first * W, rows.last * W})) reduce(run);
  } else {
    for (int y = rows.first; y < rows.last; ++y)
      for (const Span& run : Runs({y * W + columns.first, y * W + columns.last})) reduce(run);
  }
  *row.best_left = Keys ? to_key(best, index_mask) : best * row.inverse_left;
}

template <int K>
void add_rows(const float* const* rows, Span patches, float* __restrict out) {
  const float* r[2 * K + 1];
  std::copy_n(rows, 2 * K + 1, r);
  for (const Span& run : Runs(patches)) {
#pragma omp simd
    for (int q = run.first; q < run.last; ++q) {
      float s = r[0][q];
      for (int i = 1; i <= 2 * K; ++i) s += r[i][q];
      out[q] = s;
    }
  }
}

// masks: [2K, P]; mask 2d is 0 where the patch d + 1 to the left lies in another grid row, mask 2d + 1 to the right.
template <int K>
void add_horizontal(const float* s, const float* masks, int mask_stride, Span patches, float* __restrict out) {
  for (const Span& run : Runs(patches)) {
#pragma omp simd
    for (int q = run.first; q < run.last; ++q) {
      float sum = s[q];
      for (int d = 0; d < K; ++d) {
        sum += s[q - d - 1] * masks[2 * d * mask_stride + q] + s[q + d + 1] * masks[(2 * d + 1) * mask_stride + q];
      }
      out[q] = sum;
    }
  }
}

// The masks of add_horizontal, `stride` floats apart.
Buffer<float> edge_masks(int reach, int P, int W, int stride) {
  Buffer<float> masks(std::size_t(2 * std::max(reach, 1)) * stride);
  for (int d = 0; d < reach; ++d)
    for (int q = 0; q < P; ++q) {
      masks.get()[std::size_t(2 * d) * stride + q] = q % W > d ? 1.0f : 0.0f;
      masks.get()[std::size_t(2 * d + 1) * stride + q] = q % W + d + 1 < W ? 1.0f : 0.0f;
    }
  return masks;
}

struct RowWork {
  int H, W, mask_stride;
  std::uint32_t index_mask;
  const float* masks;
  float* summed;    // [P] with kMaxReach floats of margin on both sides
  float* filtered;  // [P] with kMaxReach grid rows of zeros on both sides
};

template <int K, bool Keys>
void filter_row(const float* const* rows, const RowWork& w, const Row& row) {
  const Span patches = patches_near(row.window.rows, K, w.H, w.W);
  add_rows<K>(rows, patches, w.summed);
  add_horizontal<K>(w.summed, w.masks, w.mask_stride, patches, w.filtered);
  reduce_row<K, Keys>(w.filtered, w.W, w.index_mask, row);
}

template <bool Keys>
void filter_and_reduce(const GramPass& a) {
  using FilterRow = void (*)(const float* const*, const RowWork&, const Row&);
  constexpr FilterRow kFilterRow[kMaxReach + 1] = {nullptr, filter_row<1, Keys>, filter_row<2, Keys>,
                                                   filter_row<3, Keys>, filter_row<4, Keys>};

  const int H = a.rows, W = a.columns, P = H * W, stride = round_up(P, kLanes);
  const int reach = *std::max_element(a.degrees, a.degrees + a.degree_count) / 2;

  Buffer<float> zeros(stride);
  std::vector<Buffer<float>> rings;  // rings[k - 1]: the last 2k + 1 vertical sums of reach k
  for (int k = 1; k <= reach; ++k) rings.emplace_back(std::size_t(2 * k + 1) * stride);
  const auto ring_row = [&](int k, int x) { return rings[k - 1].get() + std::size_t(x % (2 * k + 1)) * stride; };

  const Buffer<float> masks = edge_masks(reach, P, W, stride);
  Buffer<float> summed(stride + 2 * kLanes), filtered(std::size_t(stride) + 2 * kMaxReach * W + 2 * kLanes);
  const RowWork work{H,
                     W,
                     stride,
                     index_mask(P),
                     masks.get(),
                     summed.get() + kLanes,
                     filtered.get() + round_up(kMaxReach * W, kLanes)};

  std::fill_n(a.best_right, std::size_t(a.degree_count) * P, -std::numeric_limits<float>::max());
  for (int y = 0; y < H; ++y) {
    const Span summed_over = patches_near(Window(y, 0, a.window, H, W).rows, reach, H, W);
    const auto gram_row = [&](int yy, int x) {
      return yy < 0 || yy >= H ? zeros.get() : a.gram + (std::ptrdiff_t(yy) * W + x) * a.gram_stride;
    };
    for (int x = 0; x < W + reach; ++x) {
      if (x < W) {
        const float* sum = gram_row(y, x);
        for (int k = 1; k <= reach; ++k) {
          const float* rows[3] = {sum, gram_row(y - k, x), gram_row(y + k, x)};
          add_rows<1>(rows, summed_over, ring_row(k, x));
          sum = ring_row(k, x);
        }
      }
      for (int r = 0; r < a.degree_count; ++r) {
        const int k = a.degrees[r] / 2, centre = x - k;
        if (centre < 0 || centre >= W) continue;
        const int p = y * W + centre;
        const std::size_t first = std::size_t(r) * P;  // of this degree
        const Row row{Window(y, centre, a.window, H, W), std::uint32_t(p),
                      a.inverse_left[first + p], a.inverse_right + first, a.best_left + first + p,
                      a.best_right + first};
        if (k == 0) {
          reduce_row<0, Keys>(gram_row(y, centre), W, work.index_mask, row);
          continue;
        }
        const float* rows[2 * kMaxReach + 1];
        for (int dx = -k; dx <= k; ++dx) {
          rows[dx + k] = centre + dx < 0 || centre + dx >= W ? zeros.get() : ring_row(k, centre + dx);
        }
        kFilterRow[k](rows, work, row);
      }
    }
  }
  for (std::size_t i = 0; i < std::size_t(a.degree_count) * P; ++i) {
    float& best = a.best_right[i];
    best = Keys ? to_key(best, work.index_mask) : best * a.inverse_right[i];
  }
}

}  // namespace

void ZSAD_JOIN(gram_pass_, ZSAD_TARGET)(const GramPass& a) {
#if defined(__AVX512BW__)
  if (a.keys && a.narrow) {
    const narrow::Counting counting(a);
    if (counting.enough()) return narrow::Pass(a, counting).run();
  }
#endif
  a.keys ? filter_and_reduce<true>(a) : filter_and_reduce<false>(a);
}

}  // namespace zsad
