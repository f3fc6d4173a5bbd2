// Filter-and-max pass over a workspace of Grams: one image (columns) against a few (rows), every degree at once.
//
//   S_k[p, q]   = sum of gram over the (2k + 1)² neighbourhood of p and of q, zero outside the grid
//   cos_k[p, q] = S_k[p, q] * inverse_rows[k, p] * inverse_columns[k, q]
//   best_rows[k, p] = max over q of cos_k;   best_columns[k, q] = max over p of cos_k
//
// filter_max_<mask>: grid (strips * segments * bands, T), whole warps, shared memory as filter_max_shape says
//   grams           [T, P, stride] float: dot products of the layer-normed features, P = rows * columns, stride > P,
//                   and column P is 0
//   gram_step       floats from one Gram to the next
//   inverse_rows    [T, R, P] float: inverse lengths of the row images, 0 for a zero feature (pooled_norms.cu)
//   inverse_columns [R, P] float
//   best_rows       [R, P] int per Gram, Gram t at best_rows + t * rows_step; best_columns likewise. Keys of cosines
//                   (float_to_key), raised to the maximum: INT_MIN before the first launch. 0 drops a direction.
//   segment         columns of the row patches' grid that a block walks; segments = ceil(columns / segment)
//   band            grid rows of the column patches that a block covers; bands = ceil(rows / band);
//                   a thread holds 4 of its (band + 2 reach) rows, cut at the grid, at one column
// Bit k of the mask asks for degree 2k + 1; R bits are set, in ascending order.
//
// filter_max_near_<mask>: the same for patches near each other, at most `window` rows and columns apart
//   window          the last argument
//   band            of the grid rows that the row patches' strip meets, strip + 2 window of them, cut at the grid
// A zero feature has cos 1/2 with every vector and 1 with another zero feature, as far as they meet, so that the keys
// hold all that there is to know of them. (Without a window interval_average.cu goes by which images have any.)
//
// Why this shape. The product leaves a Gram of 7.5 MB (P = 1369) in L2 every 10 to 23 µs, so the pass must read it few
// times and spend well under 100 instructions on an entry. A thread owns a run of 4 column patches, one below another,
// and walks along `segment` columns of a strip of grid rows of row patches (4 rows, 2 with degree 5, 1 beyond):
// - loads are coalesced over q, start a column ahead of their use, and take one multiply-add each: a pointer for every
//   row of the strip and a running offset for every own patch. What lies outside of the grid below or beside is read
//   from the zeros behind the patches. Each entry is read (strip + 2 reach) / strip * (segment + 2 reach) / segment
//   times;
// - the box over p stays in registers: vertical sums nest (degree 5 adds two rows to degree 3) and two rows share what
//   they have in common, horizontal ones are kept as partial sums of the outputs still open, 2k per degree;
// - the box over q goes through shared memory, separably, in rows padded by zeros: down the run in registers, of which
//   only the edges pass to the runs above and below, then along the grid row, a vector per run. All degrees together
//   take two barriers a column;
// - a block covers all q (as long as they fit), so row maxima need one redux per warp, whose result waits in a place of
//   its own, and column maxima stay in registers until the end. Maxima are exact in any order: the result is
//   deterministic.
// tests/kernels/cuda/test_compile.py counts the walk's instructions an entry: 62 for degrees 1, 3, 5 on sm_89, 27 for
// 1, 3 and 10 for 1, of which 9 in 10 threads have use at 37 x 37 patches. Shared memory passes 11 words an entry with
// degree 5 and global memory 3, which take 14 cycles of a multiprocessor a warp, the instructions 15: 3 to 5 µs a Gram
// on a 4090 or a H200 where latencies are hidden. One block of 12 warps fills a multiprocessor's registers. No time has
// been measured; segment, strip_rows and kOwn are what to vary.
//
// Run: bound in comparers.py; tests/kernels/cuda/test_cuda_sources.py runs it on the host.
#include "device.h"

constexpr int kOwn = 4;           // grid rows of column patches per thread
// Grid rows of row patches per block: as many as the registers hold.
ZSAD_DEVICE constexpr int strip_rows(int reach) { return reach < 2 ? 4 : reach < 3 ? 2 : 1; }

ZSAD_DEVICE constexpr int highest_bit(int mask) { return mask > 1 ? 1 + highest_bit(mask >> 1) : 0; }
// 384 cover 37 x 37 patches and leave 168 registers a thread, 256 leave all of them; patches near each other take more
// registers and, in a band of the grid, fewer threads.
ZSAD_DEVICE constexpr int max_threads(int mask, bool near) { return mask < (near ? 4 : 8) ? 384 : 256; }
ZSAD_DEVICE constexpr int bits_set(int mask) { return mask ? (mask & 1) + bits_set(mask >> 1) : 0; }
// The place of degree 2k + 1 among those of the mask.
ZSAD_DEVICE constexpr int rank(int mask, int k) { return bits_set(mask & ((1 << k) - 1)); }

// A few values that shared memory takes and gives as one vector.
template <class T, int N>
struct alignas(N % 4 == 0 ? 16 : N % 2 == 0 ? 8 : 4) Pack {
  T at[N];
};

template <int Value>
struct Constant {
  static constexpr int value = Value;
};

// Call f(Constant<k>) for every bit k of the mask from First on.
template <int Mask, int First, class F>
ZSAD_DEVICE void for_degrees(const F& f) {
  if constexpr (Mask >> First) {
    if constexpr (Mask >> First & 1) f(Constant<First>());
    for_degrees<Mask, First + 1>(f);
  }
}

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

// NaN where an inverse is.
ZSAD_DEVICE float near_cosine(float sum, float inverse_row, float inverse_column) {
  if (inverse_row * inverse_column != 0) return sum * inverse_row * inverse_column;
  return inverse_row == inverse_column ? 1.0f : 0.5f;
}

// Take the part of shared memory that holds `count` of T, and move on to the next.
template <class T>
ZSAD_DEVICE T* take(float*& shared, int count) {
  T* const taken = reinterpret_cast<T*>(shared);
  shared += (count * int(sizeof(T) / sizeof(float)) + 3) & ~3;
  return taken;
}

// sums[i] = values[i] + ... + values[i + 2 K] for the four i, with what they have in common added once.
template <int K>
ZSAD_DEVICE void sum_windows(const float (&values)[kOwn + 2 * K], float (&sums)[kOwn]) {
  float low = values[1] + values[2], high = values[2 * K + 1] + values[2 * K + 2];
  if (K > 1) {
    float common = values[3];
#pragma unroll
    for (int d = 4; d <= 2 * K; ++d) common += values[d];
    low += common;
    high += common;
  }
  sums[0] = low + values[0];
  sums[1] = low + values[2 * K + 1];
  sums[2] = high + values[2];
  sums[3] = high + values[2 * K + 3];
}

// Take in a column of entries: sums become the box sums over p that it completes, one for each degree.
// ahead[k][.][.][d] is what the output that completes d + 1 columns later has gathered so far.
template <int Mask, int Reach, int Degrees, int Rows>
ZSAD_DEVICE void advance(const float (&loaded)[Rows + 2 * Reach][kOwn],
                         float (&ahead)[Reach + 1][Rows][kOwn][2 * Reach + 1], float (&sums)[Degrees][Rows][kOwn]) {
  float vertical[Rows][kOwn];
#pragma unroll
  for (int y = 0; y < Rows; ++y)
#pragma unroll
    for (int i = 0; i < kOwn; ++i) vertical[y][i] = loaded[Reach + y][i];
#pragma unroll
  for (int k = 0, r = 0; k <= Reach; ++k) {
    if (k > 0)
#pragma unroll
      for (int y = 0; y < Rows; y += 2)
#pragma unroll
        for (int i = 0; i < kOwn; ++i) {
          const int at = Reach + y;
          const float both = vertical[y][i] + loaded[at + k][i];  // of this row and the next, if there is one
          if (y + 1 < Rows) vertical[(y + 1) % Rows][i] = both + loaded[at + 1 + k][i];
          vertical[y][i] = both + loaded[at - k][i];
        }
    if (!(Mask >> k & 1)) continue;
#pragma unroll
    for (int y = 0; y < Rows; ++y)
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        float* open = ahead[k][y][i];
        sums[r][y][i] = k == 0 ? vertical[y][i] : open[0] + vertical[y][i];
#pragma unroll
        for (int d = 0; d < 2 * k; ++d) open[d] = d + 1 < 2 * k ? open[d + 1] + vertical[y][i] : vertical[y][i];
      }
    ++r;
  }
}

// Show the runs above and below what they need of this one's sums: its first K rows, and in the next line its last.
template <int K, int Rows>
ZSAD_DEVICE void write_edges(float* edges, int line, const float (&sums)[Rows][kOwn]) {
  Pack<float, K * Rows> top, bottom;
#pragma unroll
  for (int d = 0; d < K; ++d)
#pragma unroll
    for (int y = 0; y < Rows; ++y) {
      top.at[d * Rows + y] = sums[y][d];
      bottom.at[d * Rows + y] = sums[y][kOwn - K + d];
    }
  auto* const edge = reinterpret_cast<Pack<float, K * Rows>*>(edges);
  edge[0] = top;
  edge[line] = bottom;
}

// Sum over the grid rows of the column patches, and show the result to the columns beside.
template <int K, int Rows>
ZSAD_DEVICE void sum_rows(const float* edges, int line, float (&sums)[Rows][kOwn], Pack<float, kOwn>* summed,
                          int plane) {
  const auto* const edge = reinterpret_cast<const Pack<float, K * Rows>*>(edges);
  const Pack<float, K * Rows> above = edge[-line], below = edge[2 * line];
#pragma unroll
  for (int y = 0; y < Rows; ++y) {
    float values[kOwn + 2 * K];
#pragma unroll
    for (int d = 0; d < K; ++d) {
      values[d] = above.at[d * Rows + y];
      values[K + kOwn + d] = below.at[d * Rows + y];
    }
#pragma unroll
    for (int i = 0; i < kOwn; ++i) values[K + i] = sums[y][i];
    sum_windows<K>(values, sums[y]);
    Pack<float, kOwn> own;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) own.at[i] = sums[y][i];
    summed[y * plane] = own;
  }
}

// Sum over the grid columns of the column patches.
template <int K, int Rows>
ZSAD_DEVICE void sum_columns(const Pack<float, kOwn>* summed, int plane, float (&sums)[Rows][kOwn]) {
#pragma unroll
  for (int y = 0; y < Rows; ++y)
#pragma unroll
    for (int d = 1; d <= K; ++d) {
      const Pack<float, kOwn> before = summed[y * plane - d], after = summed[y * plane + d];
#pragma unroll
      for (int i = 0; i < kOwn; ++i) sums[y][i] += before.at[i] + after.at[i];
    }
}

template <int Mask, bool Near>
ZSAD_DEVICE void filter_max(const FilterMax& a) {
  constexpr int kReach = highest_bit(Mask), kDegrees = bits_set(Mask), kBoxes = Mask & ~1;
  constexpr int kStrip = strip_rows(kReach), kLoaded = kStrip + 2 * kReach;
  // What the walk can make anew from less, lest registers spill.
  constexpr bool kHoldsRows = kReach < 4, kHoldsInverses = kReach < 4 || !Near;
  const int H = a.rows, W = a.columns, P = H * W;
  const int strips = (H + kStrip - 1) / kStrip, segments = (W + a.segment - 1) / a.segment;
  const int y0 = blockIdx.x % strips * kStrip;
  const int x0 = blockIdx.x / strips % segments * a.segment, x1 = min(x0 + a.segment, W);
  const int met0 = Near ? max(y0 - a.window, 0) : 0, met1 = Near ? min(y0 + kStrip + a.window, H) : H;
  const int band0 = met0 + blockIdx.x / (strips * segments) * a.band, band1 = min(band0 + a.band, met1);
  if (Near && band0 >= band1) return;
  const int halo0 = max(band0 - kReach, 0), halo1 = min(band1 + kReach, H);
  const int run = threadIdx.x / W, qx = threadIdx.x % W;

  // Runs of threads past the halo filter zeros, into places of their own.
  const int runs = (blockDim.x + W - 1) / W, pitch = W + kReach, plane = kReach + runs * pitch;
  const int slots = a.segment + 2 * kReach;  // of the columns px from x0 - kReach on
  ZSAD_SHARED(float, shared);
  Pack<float, kOwn>* summed[kReach + 1];  // [degree k][kStrip, plane] box over p and over the column patches' rows
  float* edges[kReach + 1];               // [degree k][2 runs + 2, W] what the runs above and below need of a run
  float* free = shared;
  for_degrees<kBoxes, 0>([&](auto degree) {
    constexpr int k = decltype(degree)::value;
    summed[k] = take<Pack<float, kOwn>>(free, kStrip * plane) + kReach + run * pitch + qx;
    edges[k] = take<float>(free, 2 * (runs + 1) * W * k * kStrip) + ((2 * run + 1) * W + qx) * k * kStrip;
  });
  auto* const inverse_rows = take<Pack<float, kStrip>>(free, kDegrees * slots);
  for (float* at = shared + threadIdx.x; at < free; at += blockDim.x) *at = 0;
  auto* const row_best = take<Pack<int, kStrip>>(free, blockDim.x / kWarp * kDegrees * slots);
  __syncthreads();

  // NaN never is the greater: that is how patches outside of the grid and of the block's part are left out.
  const float nan = __int_as_float(0x7fffffff);
  const float* const inverse = a.inverse_rows + static_cast<long long>(blockIdx.y) * kDegrees * P;
  for (int i = threadIdx.x; i < kDegrees * slots * kStrip; i += blockDim.x) {
    const int px = x0 - kReach + i / kStrip % slots, py = y0 + i % kStrip, degree = i / (kStrip * slots);
    const bool in_part = px >= x0 && px < x1 && py < H;
    inverse_rows[i / kStrip].at[i % kStrip] = in_part ? inverse[degree * P + py * W + px] : nan;
  }
  const int first = max(x0 - kReach, 0);
  unsigned offset[kOwn];  // from the start of a grid row of row patches on
  float held[kDegrees][kOwn] = {}, column_best[kDegrees][kOwn];
  const auto inverse_column = [&](int r, int i) {
    if (kHoldsInverses) return held[r][i];
    const int qy = halo0 + run * kOwn + i;
    const float* degree = a.inverse_columns + r * P;
    keep(degree);  // or the compiler holds what follows from it, for every degree
    float loaded = nan;
    load_if(qy >= band0 && qy < band1, degree + unsigned(qy * W + qx), loaded);
    return loaded;
  };
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    const int qy = halo0 + run * kOwn + i, q = qy * W + qx;
    offset[i] = first * a.stride + (qy < halo1 ? q : P);  // past the patches there are zeros
#pragma unroll
    for (int r = 0; r < kDegrees; ++r) {
      if (kHoldsInverses) held[r][i] = qy >= band0 && qy < band1 ? a.inverse_columns[r * P + q] : nan;
      column_best[r][i] = kLowest;
    }
  }

  const float* row[kHoldsRows ? kLoaded : 1];
  bool inside[kLoaded];
#pragma unroll
  for (int y = 0; y < kLoaded; ++y) {
    const int py = y0 + y - kReach;
    inside[y] = py >= 0 && py < H;
    if (!kHoldsRows && y > 0) continue;
    const int from = inside[y] || !kHoldsRows ? py * W : 0;
    row[y] = a.grams + blockIdx.y * a.gram_step + static_cast<long long>(from) * a.stride;
    keep(row[y]);
  }
  float loaded[kLoaded][kOwn] = {};  // rows outside of the grid stay zero
  const auto load = [&] {
#pragma unroll
    for (int y = 0; y < kLoaded; ++y)
#pragma unroll
      for (int i = 0; i < kOwn; ++i)
        load_if(inside[y], kHoldsRows ? row[y] + offset[i] : row[0] + (offset[i] + unsigned(y * W) * a.stride),
                loaded[y][i]);
  };
  load();
  __syncthreads();

  float ahead[kReach + 1][kStrip][kOwn][2 * kReach + 1] = {};
  for (int x = first; x < x1 + kReach; ++x) {
    float sums[kDegrees][kStrip][kOwn];
    advance<Mask, kReach>(loaded, ahead, sums);
    // Past the grid come zeros, from behind the patches of any row.
#pragma unroll
    for (int i = 0; i < kOwn; ++i) offset[i] = x + 1 < W ? offset[i] + a.stride : (W - 1) * a.stride + P;
    load();
    if (x < x0) continue;

    const auto raise = [&](auto degree) {
      constexpr int k = decltype(degree)::value, r = rank(Mask, k);
      if constexpr (k > 0) sum_columns<k>(summed[k], plane, sums[r]);
      const int at = r * slots + x - x0 + kReach - k;
      const Pack<float, kStrip> inverse_row = inverse_rows[at];
      // Near: grid rows from the strip's first one to the run; too many for any window where columns are far apart.
      const int below = Near && abs(qx - (x - k)) <= a.window ? halo0 + run * kOwn - y0 : 2 * H + a.window;
      Pack<int, kStrip> best;
#pragma unroll
      for (int y = 0; y < kStrip; ++y) {
        float greatest = kLowest;
#pragma unroll
        for (int i = 0; i < kOwn; ++i) {
          if (Near) {
            if (abs(below + i - y) > a.window) continue;
            const float cosine = near_cosine(sums[r][y][i], inverse_row.at[y], inverse_column(r, i));
            greatest = fmaxf(greatest, cosine);
            column_best[r][i] = fmaxf(column_best[r][i], cosine);
            continue;
          }
          greatest = fmaxf(greatest, sums[r][y][i] * inverse_column(r, i));
          column_best[r][i] = fmaxf(column_best[r][i], sums[r][y][i] * inverse_row.at[y]);
        }
        best.at[y] = __reduce_max_sync(kFullWarp, float_to_key(greatest));
      }
      if (threadIdx.x % kWarp == 0) row_best[threadIdx.x / kWarp * kDegrees * slots + at] = best;
    };
    for_degrees<Mask & 1, 0>(raise);  // needs nobody else's sums
    for_degrees<kBoxes, 0>([&](auto degree) {
      constexpr int k = decltype(degree)::value;
      write_edges<k>(edges[k], W, sums[rank(Mask, k)]);
    });
    if (kReach > 0) __syncthreads();
    for_degrees<kBoxes, 0>([&](auto degree) {
      constexpr int k = decltype(degree)::value;
      sum_rows<k>(edges[k], W, sums[rank(Mask, k)], summed[k], plane);
    });
    if (kReach > 0) __syncthreads();
    for_degrees<kBoxes, 0>(raise);
  }

  if (a.best_columns) {
    int* const best_columns = a.best_columns + blockIdx.y * a.columns_step;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int qy = halo0 + run * kOwn + i;
      if (qy < band0 || qy >= band1) continue;
#pragma unroll
      for (int r = 0; r < kDegrees; ++r)
        atomicMax(best_columns + r * P + qy * W + qx,
                  float_to_key(column_best[r][i] * (Near ? 1 : inverse_column(r, i))));
    }
  }
  if (a.best_rows) {
    __syncthreads();
    int* const best_rows = a.best_rows + blockIdx.y * a.rows_step;
    for (int i = threadIdx.x; i < kDegrees * slots * kStrip; i += blockDim.x) {
      const int px = x0 - kReach + i / kStrip % slots, py = y0 + i % kStrip, degree = i / (kStrip * slots);
      if (px < x0 || px >= x1 || py >= H) continue;
      int best = row_best[i / kStrip].at[i % kStrip];
      for (int w = 1; w < blockDim.x / kWarp; ++w)
        best = max(best, row_best[w * kDegrees * slots + i / kStrip].at[i % kStrip]);
      const float cosine = key_to_float(best) * (Near ? 1 : inverse_rows[i / kStrip].at[i % kStrip]);
      atomicMax(best_rows + degree * P + py * W + px, float_to_key(cosine));
    }
  }
}

#define ZSAD_FILTER_MAX_(mask)                                                                                        \
  ZSAD_KERNEL(max_threads(mask, false), 1)                                                                            \
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
  ZSAD_KERNEL(max_threads(mask, true), 1)                                                                             \
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
