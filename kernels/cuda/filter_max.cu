// Filter-and-max pass over a workspace of Grams: one image (columns) against a few (rows), every degree at once.
//
//   S_k[p, q]   = sum of gram over the (2k + 1)² neighbourhood of p and of q, zero outside the grid
//   cos_k[p, q] = S_k[p, q] * inverse_rows[k, p] * inverse_columns[k, q]
//   best_rows[k, p] = max over q of cos_k;   best_columns[k, q] = max over p of cos_k
//
// filter_max_<mask>: grid (strips * segments * bands, T), whole warps, shared memory as filter_max_shape says
//   grams           [T, P, stride] float: dot products of the layer-normed features, P = rows * columns, stride >= P
//   gram_step       floats from one Gram to the next
//   inverse_rows    [T, R, P] float: inverse lengths of the row images, 0 for a zero feature (pooled_norms.cu)
//   inverse_columns [R, P] float
//   best_rows       [R, P] int per Gram, Gram t at best_rows + t * rows_step; best_columns likewise. Keys of cosines
//                   (float_to_key), raised to the maximum: INT_MIN before the first launch. 0 drops a direction.
//   segment         columns of the row patches' grid that a block walks; segments = ceil(columns / segment)
//   band            grid rows of the column patches that a block covers; bands = ceil(rows / band);
//                   (band + 2 reach) * columns, cut at the grid, must fit 2 patches per thread
// Bit k of the mask asks for degree 2k + 1; R bits are set, in ascending order.
//
// filter_max_near_<mask>: the same for patches near each other, at most `window` rows and columns apart
//   window          the last argument
//   band            of the grid rows that the row patches' strip meets, strip + 2 window of them, cut at the grid
// A zero feature has cos 1/2 with every vector and 1 with another zero feature, as far as they meet, so that the keys
// hold all that there is to know of them. (Without a window interval_average.cu goes by which images have any.)
//
// Why this shape. The product leaves a Gram of 7.5 MB (P = 1369) in L2 every 10 to 23 µs, so the pass must read it few
// times and spend well under 100 instructions on an entry. A thread owns 2 column patches and walks along `segment`
// columns of a strip of grid rows of row patches (4 rows, 2 with degree 5, 1 beyond):
// - loads are coalesced over q; an entry is read (strip + 2 reach) / strip * (segment + 2 reach) / segment times;
// - the box over p stays in registers: vertical sums nest (degree 5 adds two rows to degree 3), horizontal ones are
//   kept as partial sums of the outputs still open, 2k per degree, so no window is read again;
// - the box over q goes through shared memory, separably, in rows padded by zeros: no edge tests, two barriers, and
//   the strip's rows side by side, so that one vector access serves them all;
// - a block covers all q (as long as they fit), so row maxima need one redux per warp and an atomic in shared memory,
//   and column maxima stay in registers until the end. Maxima are exact in any order: the result is deterministic.
// Estimate for reaches 0, 1, 2: 65 instructions and 18 words of shared memory an entry, which is 4 to 6 µs a Gram on a
// H200 and on a 4090 where latencies are hidden. Nothing here has been measured; segment, strip_rows and kOwn are what
// to vary.
//
// Run: bound in comparers.py; tests/kernels/cuda/test_cuda_sources.py runs it on the host.
#include "device.h"

constexpr int kOwn = 2;           // column patches per thread
constexpr int kMaxThreads = 704;  // covers 37 x 37 patches and leaves 80 registers a thread
// Grid rows of row patches per block: as many as the registers hold.
ZSAD_DEVICE constexpr int strip_rows(int reach) { return reach < 2 ? 4 : reach < 3 ? 2 : 1; }

ZSAD_DEVICE constexpr int highest_bit(int mask) { return mask > 1 ? 1 + highest_bit(mask >> 1) : 0; }
ZSAD_DEVICE constexpr int bits_set(int mask) { return mask ? (mask & 1) + bits_set(mask >> 1) : 0; }

// One value per row of the strip, read and written as one vector.
template <int Rows>
struct alignas(4 * Rows) Strip {
  float row[Rows];
};

struct FilterMax {
  const float* grams;
  int stride;
  long long gram_step;
  int rows, columns;
  const float *inverse_rows, *inverse_columns;
  int* best_rows;
  long long rows_step;
  int* best_columns;
  long long columns_step;
  int segment, band;
  int window;  // near only
};

ZSAD_DEVICE float near_cosine(float sum, float inverse_row, float inverse_column) {
  if (inverse_row != 0 && inverse_column != 0) return sum * inverse_row * inverse_column;
  return inverse_row == inverse_column ? 1.0f : 0.5f;
}

// Add the `reach` cells at multiples of `step` on both sides of `centre`.
template <int Rows>
ZSAD_DEVICE void add_neighbours(const Strip<Rows>* centre, int step, int reach, Strip<Rows>& sum) {
#pragma unroll
  for (int d = 1; d <= reach; ++d) {
    const Strip<Rows> before = centre[-d * step], after = centre[d * step];
#pragma unroll
    for (int y = 0; y < Rows; ++y) sum.row[y] += before.row[y] + after.row[y];
  }
}

template <int Mask, bool Near>
ZSAD_DEVICE void filter_max(const FilterMax& a) {
  constexpr int kReach = highest_bit(Mask), kDegrees = bits_set(Mask);
  constexpr int kStrip = strip_rows(kReach), kLoaded = kStrip + 2 * kReach;
  const int H = a.rows, W = a.columns, P = H * W;
  const int strips = (H + kStrip - 1) / kStrip, segments = (W + a.segment - 1) / a.segment;
  const int y0 = blockIdx.x % strips * kStrip;
  const int x0 = blockIdx.x / strips % segments * a.segment, x1 = min(x0 + a.segment, W);
  const int met0 = Near ? max(y0 - a.window, 0) : 0, met1 = Near ? min(y0 + kStrip + a.window, H) : H;
  const int band0 = met0 + blockIdx.x / (strips * segments) * a.band, band1 = min(band0 + a.band, met1);
  if (Near && band0 >= band1) return;
  const int halo0 = max(band0 - kReach, 0), halo1 = min(band1 + kReach, H);

  const int pitch = W + kReach, plane = kReach + (halo1 - halo0 + 2 * kReach) * pitch;
  ZSAD_SHARED(Strip<kStrip>, shared);
  Strip<kStrip>* const summed = shared;              // [plane] box over p
  Strip<kStrip>* const horizontal = summed + plane;  // [plane] and over the column patches' grid columns
  int* const row_best = reinterpret_cast<int*>(horizontal + plane);  // [kDegrees, kStrip, segment]
  for (int i = threadIdx.x; i < 2 * plane; i += blockDim.x) shared[i] = {};
  for (int i = threadIdx.x; i < kDegrees * kStrip * a.segment; i += blockDim.x) row_best[i] = float_to_key(kLowest);
  __syncthreads();

  const float* const gram = a.grams + blockIdx.y * a.gram_step;
  const float* const inverse_rows = a.inverse_rows + static_cast<long long>(blockIdx.y) * kDegrees * P;
  int q[kOwn], cell[kOwn];
  bool loads[kOwn], owns[kOwn];
  float column_best[kDegrees][kOwn];
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    q[i] = halo0 * W + i * blockDim.x + threadIdx.x;
    loads[i] = q[i] < halo1 * W;
    owns[i] = q[i] >= band0 * W && q[i] < band1 * W;
    cell[i] = kReach + (q[i] / W - halo0 + kReach) * pitch + q[i] % W;
#pragma unroll
    for (int r = 0; r < kDegrees; ++r) column_best[r][i] = kLowest;
  }

  // ahead[k][.][.][d]: what the output that completes d + 1 columns later has gathered so far.
  float ahead[kReach + 1][kStrip][kOwn][2 * kReach + 1] = {};
  for (int x = x0 - kReach; x < x1 + kReach; ++x) {
    float loaded[kLoaded][kOwn];
#pragma unroll
    for (int y = 0; y < kLoaded; ++y) {
      const int py = y0 + y - kReach;
      const bool inside = py >= 0 && py < H && x >= 0 && x < W;
#pragma unroll
      for (int i = 0; i < kOwn; ++i)
        loaded[y][i] = inside && loads[i] ? gram[static_cast<long long>(py * W + x) * a.stride + q[i]] : 0.0f;
    }
    float vertical[kStrip][kOwn];
#pragma unroll
    for (int k = 0, r = 0; k <= kReach; ++k) {
      Strip<kStrip> sum[kOwn];
#pragma unroll
      for (int y = 0; y < kStrip; ++y)
#pragma unroll
        for (int i = 0; i < kOwn; ++i) {
          if (k == 0) vertical[y][i] = loaded[kReach + y][i];
          else vertical[y][i] += loaded[kReach + y - k][i] + loaded[kReach + y + k][i];
          if (!(Mask >> k & 1)) continue;
          float* open = ahead[k][y][i];
          sum[i].row[y] = k == 0 ? vertical[y][i] : open[0] + vertical[y][i];
#pragma unroll
          for (int d = 0; d < 2 * k; ++d) open[d] = d + 1 < 2 * k ? open[d + 1] + vertical[y][i] : vertical[y][i];
        }
      if (!(Mask >> k & 1)) continue;
      const int degree = r++, px = x - k;
      if (px < x0 || px >= x1) continue;  // the same for the whole block

      if (k > 0) {
#pragma unroll
        for (int i = 0; i < kOwn; ++i)
          if (loads[i]) summed[cell[i]] = sum[i];
        __syncthreads();
#pragma unroll
        for (int i = 0; i < kOwn; ++i) {
          if (!loads[i]) continue;
          add_neighbours(summed + cell[i], 1, k, sum[i]);
          horizontal[cell[i]] = sum[i];
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < kOwn; ++i)
          if (loads[i]) add_neighbours(horizontal + cell[i], pitch, k, sum[i]);
      }

      float inverse_column[kOwn];  // from L1 again and again: registers are what runs out
#pragma unroll
      for (int i = 0; i < kOwn; ++i) inverse_column[i] = owns[i] ? a.inverse_columns[degree * P + q[i]] : 0.0f;
      int below[kOwn] = {};  // grid rows from the strip's first one to the column patch; too many for any window
      if (Near) {
#pragma unroll
        for (int i = 0; i < kOwn; ++i) below[i] = abs(q[i] % W - px) > a.window ? 2 * H + a.window : q[i] / W - y0;
      }
#pragma unroll
      for (int y = 0; y < kStrip; ++y) {
        if (y0 + y >= H) break;
        const float inverse_row = inverse_rows[degree * P + (y0 + y) * W + px];
        float best = kLowest;
#pragma unroll
        for (int i = 0; i < kOwn; ++i) {
          if (!owns[i]) continue;
          if (Near) {
            if (abs(below[i] - y) > a.window) continue;
            const float cosine = near_cosine(sum[i].row[y], inverse_row, inverse_column[i]);
            best = fmaxf(best, cosine);
            column_best[degree][i] = fmaxf(column_best[degree][i], cosine);
            continue;
          }
          best = fmaxf(best, sum[i].row[y] * inverse_column[i]);
          column_best[degree][i] = fmaxf(column_best[degree][i], sum[i].row[y] * inverse_row);
        }
        const int key = __reduce_max_sync(kFullWarp, float_to_key(best));
        if (threadIdx.x % kWarp == 0) atomicMax(row_best + (degree * kStrip + y) * a.segment + px - x0, key);
      }
    }
  }

  if (a.best_columns) {
    int* const best_columns = a.best_columns + blockIdx.y * a.columns_step;
#pragma unroll
    for (int r = 0; r < kDegrees; ++r)
#pragma unroll
      for (int i = 0; i < kOwn; ++i)
        if (owns[i]) {
          const int at = r * P + q[i];
          atomicMax(best_columns + at, float_to_key(column_best[r][i] * (Near ? 1 : a.inverse_columns[at])));
        }
  }
  if (a.best_rows) {
    __syncthreads();
    int* const best_rows = a.best_rows + blockIdx.y * a.rows_step;
    for (int i = threadIdx.x; i < kDegrees * kStrip * a.segment; i += blockDim.x) {
      const int px = x0 + i % a.segment, py = y0 + i / a.segment % kStrip;
      if (px >= x1 || py >= H) continue;
      const int at = i / (a.segment * kStrip) * P + py * W + px;
      atomicMax(best_rows + at, float_to_key(key_to_float(row_best[i]) * (Near ? 1 : inverse_rows[at])));
    }
  }
}

#define ZSAD_FILTER_MAX_(mask)                                                                                        \
  ZSAD_KERNEL(kMaxThreads, 1)                                                                                         \
  filter_max_##mask(const float* grams, int stride, long long gram_step, int rows, int columns,                       \
                    const float* inverse_rows, const float* inverse_columns, int* best_rows, long long rows_step,     \
                    int* best_columns, long long columns_step, int segment, int band) {                               \
    filter_max<mask, false>({grams, stride, gram_step, rows, columns, inverse_rows, inverse_columns, best_rows,       \
                             rows_step, best_columns, columns_step, segment, band, 0});                               \
  }
#define ZSAD_FILTER_MAX(mask) ZSAD_FILTER_MAX_(mask)

ZSAD_FILTER_MAX(1)  // degree 1
ZSAD_FILTER_MAX(3)  // degrees 1, 3
ZSAD_FILTER_MAX(7)  // degrees 1, 3, 5
#ifdef ZSAD_MASK    // any other choice, compiled when it is first asked for
ZSAD_FILTER_MAX(ZSAD_MASK)
#endif

#define ZSAD_FILTER_MAX_NEAR_(mask)                                                                                   \
  ZSAD_KERNEL(kMaxThreads, 1)                                                                                         \
  filter_max_near_##mask(const float* grams, int stride, long long gram_step, int rows, int columns,                  \
                         const float* inverse_rows, const float* inverse_columns, int* best_rows,                     \
                         long long rows_step, int* best_columns, long long columns_step, int segment, int band,       \
                         int window) {                                                                                \
    filter_max<mask, true>({grams, stride, gram_step, rows, columns, inverse_rows, inverse_columns, best_rows,        \
                            rows_step, best_columns, columns_step, segment, band, window});                           \
  }
#define ZSAD_FILTER_MAX_NEAR(mask) ZSAD_FILTER_MAX_NEAR_(mask)

#ifdef ZSAD_NEAR_MASK  // as any other choice
ZSAD_FILTER_MAX_NEAR(ZSAD_NEAR_MASK)
#endif
