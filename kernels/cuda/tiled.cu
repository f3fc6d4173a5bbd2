// One tensor-core product for every degree whose Gram never leaves the chip: a block multiplies two blocks of patches
// with a halo, box-filters the tile and takes the maxima of what is complete.
//
//   S_k[p, q]   = sum of rows[p'] · column[q'] over p' and q' in the (2k + 1)² neighbourhoods of p and of q, cut at the grid
//   cos_k[p, q] = S_k[p, q] * inverse_rows[k, p] * inverse_columns[k, q]
//   best_rows[k, p] = max over q of cos_k;   best_columns[k, q] = max over p of cos_k
//
// tiled_max: grid (row blocks * column blocks, T), 256 threads, shared memory as tiled_shape says (variants.py)
//   features        [P, stride] fp16 bits per image, layer-normed, P = grid rows * columns; channels are filled up with
//                   zeros to whole steps of 64 bytes. Row image t at rows + t * image_step, all at multiples of 16 bytes
//   inverse_rows    [T, R, P] float: inverse lengths of the row images, 0 for a zero feature (pooled_norms.cu)
//   inverse_columns [R, P] float
//   best_rows       [R, P] int per image, image t at best_rows + t * rows_step; best_columns likewise. Keys of cosines
//                   (float_to_key), raised to the maximum: INT_MIN before the first launch. 0 drops a direction.
//   mask            bit k asks for degree 2k + 1 up to 9; R bits are set
//   row_height, row_width, column_height, column_width
//                   patches that a block holds of either image at most, halo among them: 256 of the rows, 128 of the
//                   columns; more than 2 reach, or the whole grid, down and across
//
// Why this shape, and what it costs. Of the tile only entries count that the halo encloses, and it does so in all four
// dimensions of a pair: with degree 5 a tile of 256 x 128 patches completes 169 x 81 entries at most. Accumulators and
// what one step of the filter leaves (the box sums over column patches, of all rows of a tile) must fit a multiprocessor
// and 99 KB of sm_86, 89 and 120, which is how large a tile may be: 128 x 128 would multiply 5.5 times for degree 5.
// - Product as in tile.h, a block per multiprocessor: for a warp's 4096 entries and 32 channels 159 instructions, by
//   wgmma 102.
// - The tile goes through shared memory in slices of 32 rows, once per degree, and is summed over column patches: across
//   in window sums, down as sums that stay open. 14, 23, 35 instructions an entry for degrees 1, 3, 5.
// - What it leaves is summed over row patches in the same way, a vector of four entries a lane: 53, 78, 113 instructions
//   a vector, maxima among them. Row maxima take a redux per row and an atomic, column maxima wait in registers and meet
//   in shared memory. Maxima are exact in any order: the result is deterministic.
// At 37 x 37 patches and 1024 channels, per entry of the Gram (instructions of a thread) and per pair:
//
//   degrees   tiles of a pair   products multiply by   instructions: product (wgmma), filter   bytes from L2
//   1         13 x 8            1.8                     72 (46), 36                              82 MB
//   1, 3      15 x 9            2.4                     94 (60), 129                            106 MB
//   1, 3, 5   25 x 9            3.9                    156 (100), 423                           177 MB
//
// The Gram's pass takes 10, 27 and 62 instructions an entry (filter_max.cu) and reads some 25 MB from L2. By this model
// tiles lose on a H200 too: for degrees 1, 3 the product alone takes 9 µs at the tensor peak and about 18 at what L2
// gives, where the Gram's product takes 4 and its pass 3; wgmma does not lift the latter limit. Nothing has been
// measured. What would change the balance: tiles of 256 x 256 in tensor memory (sm_100; 2.8 times the products for degree
// 5), rows of tiles that keep their lower halo, filters as products with bands of ones.
//
// Run: launch shapes in variants.py; tests/kernels/cuda/test_variants.py runs it on the host.
#include "tile.h"

constexpr int kRows = 256;
constexpr int kThreads = Tile<kRows>::threads, kWarps = kThreads / kWarp;
constexpr int kSlice = 32, kSlices = kRows / kSlice;  // rows of the tile that are filtered together, and how often:
constexpr int kApart = 8 * kSlices;                   // runs of 8 rows, so far from one to the next
constexpr int kPitch = kColumns + 8;  // between them, so that the 4 x 4 lanes of a store in pairs meet different banks
constexpr int kMaxReach = 4;
static_assert(kThreads >= kColumns, "a thread for each column's maximum");

struct alignas(8) Pair {
  float first, second;
};

struct alignas(16) Four {
  float at[4];
};
static_assert(4 * kWarp == kColumns, "four column patches a lane");

ZSAD_DEVICE Four operator+(const Four& a, const Four& b) {
  return {a.at[0] + b.at[0], a.at[1] + b.at[1], a.at[2] + b.at[2], a.at[3] + b.at[3]};
}

struct Tiled {
  const unsigned char* rows;
  long long image_bytes;
  const unsigned char* column;
  int grid_rows, grid_columns, patch_bytes;
  const float *inverse_rows, *inverse_columns;
  int* best_rows;
  long long rows_step;
  int* best_columns;
  long long columns_step;
  int mask, row_height, row_width, column_height, column_width;
};

// The part of one grid axis that a block holds, and of that the part that is its own: blocks overlap by twice the reach.
struct Span {
  int first, held;     // of the grid
  int skipped, own;    // of what is held
  static ZSAD_DEVICE int count(int size, int held, int reach) {
    return held >= size ? 1 : (size - 2 * reach + held - 2 * reach - 1) / (held - 2 * reach);
  }

  ZSAD_DEVICE Span(int number, int size, int most, int reach) {
    first = number * (most - 2 * reach);
    held = min(most, size - first);
    skipped = number > 0 ? reach : 0;
    own = held - skipped - (number + 1 < count(size, most, reach) ? reach : 0);
  }
};

struct Area {
  Span y, x;
  int width;  // of the grid

  // The patch of the grid at a place of what is held; the last one stands in for places past it.
  ZSAD_DEVICE int patch(int place) const {
    const int at = min(place, y.held * x.held - 1);
    return (y.first + at / x.held) * width + x.first + at % x.held;
  }
  ZSAD_DEVICE int own_patch(int at) const {
    return (y.first + y.skipped + at / x.own) * width + x.first + x.skipped + at % x.own;
  }
  ZSAD_DEVICE int own() const { return y.own * x.own; }
  ZSAD_DEVICE int own_fours() const { return (own() + 3) / 4; }
};

// Sums of 2 K + 1 values, one completed by every value that is taken in; K values late.
template <int K, class T>
struct Running {
  T open[2 * K + 1] = {};

  ZSAD_DEVICE T take(const T& value) {
    const T sum = open[0] + value;
#pragma unroll
    for (int d = 0; d < 2 * K; ++d) open[d] = d + 1 < 2 * K ? open[d + 1] + value : value;
    return sum;
  }
};

// Sum of the 2 K + 1 values around `from`, `step` apart, of which those before `low` and from `high` on do not count.
template <int K, class T>
ZSAD_DEVICE T sum_across(const T* from, int step, int low, int high) {
  T sum = from[0];
#pragma unroll
  for (int d = 1; d <= K; ++d) {
    if (-d >= low) sum = sum + from[-d * step];
    if (d < high) sum = sum + from[d * step];
  }
  return sum;
}

// Box sums over the column patches of a slice of the tile: summed[row of the tile, own column patches in fours].
template <int K>
ZSAD_DEVICE void filter_columns(const float* slice, int number, const Area& rows, const Area& columns, float* summed) {
  const int own_width = columns.x.own, width = columns.x.held, pitch = columns.own_fours() * 4;
  for (int task = threadIdx.x; task < kSlice * own_width; task += kThreads) {
    const int line = task / own_width, own_x = task % own_width, x = columns.x.skipped + own_x;
    const int row = line / 8 * kApart + number * 8 + line % 8;
    if (row >= rows.y.held * rows.x.held) continue;
    const float* at = slice + line * kPitch + x;
    float* out = summed + row * pitch + own_x;
    Running<K, float> sums;
#pragma unroll 1
    for (int y = 0; y < columns.y.held + K; ++y) {
      const float sum = sums.take(y < columns.y.held ? sum_across<K>(at + y * width, 1, -x, width - x) : 0);
      const int own_y = y - K - columns.y.skipped;
      if (own_y >= 0 && own_y < columns.y.own) out[own_y * own_width] = sum;
    }
  }
}

// Box sums over the row patches, and their maxima: a warp takes a column of the grid, a lane four column patches.
//   inverse_rows, inverse_columns, best_rows: of the degree; found [kWarps, kColumns] takes every warp's best of a column
template <int K>
ZSAD_DEVICE void filter_rows(const float* summed, const Area& rows, const Area& columns, const float* inverse_rows,
                             const float* inverse_columns, int* best_rows, float* found) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, width = rows.x.held, fours = columns.own_fours();
  const Four* const own = reinterpret_cast<const Four*>(summed) + min(lane, fours - 1);
  // NaN never is the greater: that is how places past the block's own patches are left out.
  float inverse_column[4], column_best[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int q = 4 * lane + i;
    inverse_column[i] = q < columns.own() ? inverse_columns[columns.own_patch(q)] : __int_as_float(0x7fffffff);
    column_best[i] = kLowest;
  }
  for (int x = rows.x.skipped + warp; x < rows.x.skipped + rows.x.own; x += kWarps) {
    Running<K, Four> sums;
    const Four* at = own + x * fours;
#pragma unroll 1
    for (int y = 0; y < rows.y.held + K; ++y, at += width * fours) {
      const Four sum = sums.take(y < rows.y.held ? sum_across<K>(at, fours, -x, width - x) : Four());
      const int own_y = y - K - rows.y.skipped;
      if (own_y < 0 || own_y >= rows.y.own) continue;
      const int p = (rows.y.first + y - K) * rows.width + rows.x.first + x;
      const float inverse_row = inverse_rows[p];
      float greatest = kLowest;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        greatest = fmaxf(greatest, sum.at[i] * inverse_column[i]);
        column_best[i] = fmaxf(column_best[i], sum.at[i] * inverse_row);
      }
      const int best = __reduce_max_sync(kFullWarp, float_to_key(greatest));
      if (lane == 0 && best_rows) atomicMax(best_rows + p, float_to_key(key_to_float(best) * inverse_row));
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) found[warp * kColumns + 4 * lane + i] = column_best[i] * inverse_column[i];
}

// Call f(Constant<k>) for a degree 2k + 1.
template <int K>
struct Constant {
  static constexpr int value = K;
};
template <class F>
ZSAD_DEVICE void with_reach(int k, const F& f) {
  if (k == 0) f(Constant<0>());
  if (k == 1) f(Constant<1>());
  if (k == 2) f(Constant<2>());
  if (k == 3) f(Constant<3>());
  if (k == 4) f(Constant<4>());
}

ZSAD_DEVICE void multiply_and_filter(const Tiled& a) {
  ZSAD_SHARED(unsigned char, stages);
  float* const slice = reinterpret_cast<float*>(stages);  // [kSlice, kPitch], later [kWarps, kColumns]
  float* const summed = slice + kSlice * kPitch;          // [rows held, own columns in fours]
  const int lane = threadIdx.x % kWarp, H = a.grid_rows, W = a.grid_columns;
  int reach = 0, degrees = 0;
  for (int k = 0; k <= kMaxReach; ++k)
    if (a.mask >> k & 1) reach = k, ++degrees;

  const int across = Span::count(W, a.row_width, reach), column_across = Span::count(W, a.column_width, reach);
  const int blocks = Span::count(H, a.row_height, reach) * across;
  const int row_block = blockIdx.x % blocks, column_block = blockIdx.x / blocks;
  const Area rows = {{row_block / across, H, a.row_height, reach}, {row_block % across, W, a.row_width, reach}, W};
  const Area columns = {{column_block / column_across, H, a.column_height, reach},
                        {column_block % column_across, W, a.column_width, reach},
                        W};

  float sums[kRowSets][kColumnSets][4] = {};
  multiply_tile<kRows>(
      stages, a.rows + blockIdx.y * a.image_bytes, [&](int place) { return rows.patch(place); }, a.column,
      [&](int place) { return columns.patch(place); }, a.patch_bytes, sums);

  for (int k = 0, r = 0; k <= reach; ++k) {
    if (!(a.mask >> k & 1)) continue;
    for (int number = 0; number < kSlices; ++number) {
      __syncthreads();  // what the slice held, before the first one the stages, is read to the end
#pragma unroll
      for (int i = 0; i < kRowSets; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = set_row(i, half);
          if (row / 8 % kSlices != number) continue;
#pragma unroll
          for (int j = 0; j < kColumnSets; ++j) {
            float* const at = slice + (row / kApart * 8 + lane / 4) * kPitch + set_column(j) + lane % 4 * 2;
            *reinterpret_cast<Pair*>(at) = {sums[i][j][2 * half], sums[i][j][2 * half + 1]};
          }
        }
      __syncthreads();
      with_reach(k, [&](auto degree) {
        filter_columns<decltype(degree)::value>(slice, number, rows, columns, summed);
      });
    }
    __syncthreads();  // all is summed over the column patches, and the slice is free
    const long long at = (blockIdx.y * static_cast<long long>(degrees) + r) * H * W;
    with_reach(k, [&](auto degree) {
      filter_rows<decltype(degree)::value>(
          summed, rows, columns, a.inverse_rows + at, a.inverse_columns + r * H * W,
          a.best_rows ? a.best_rows + blockIdx.y * a.rows_step + r * H * W : nullptr, slice);
    });
    __syncthreads();
    if (a.best_columns && threadIdx.x < columns.own()) {
      float best = slice[threadIdx.x];
#pragma unroll
      for (int w = 1; w < kWarps; ++w) best = fmaxf(best, slice[w * kColumns + threadIdx.x]);
      atomicMax(a.best_columns + blockIdx.y * a.columns_step + r * H * W + columns.own_patch(threadIdx.x),
                float_to_key(best));
    }
    ++r;
  }
}

ZSAD_KERNEL(kThreads, 1)
tiled_max(const half_bits* rows, long long image_step, const half_bits* column, int grid_rows, int grid_columns,
          int stride, const float* inverse_rows, const float* inverse_columns, int* best_rows, long long rows_step,
          int* best_columns, long long columns_step, int mask, int row_height, int row_width, int column_height,
          int column_width) {
  multiply_and_filter({reinterpret_cast<const unsigned char*>(rows), 2 * image_step,
                       reinterpret_cast<const unsigned char*>(column), grid_rows, grid_columns, 2 * stride,
                       inverse_rows, inverse_columns, best_rows, rows_step, best_columns, columns_step, mask,
                       row_height, row_width, column_height, column_width});
}
