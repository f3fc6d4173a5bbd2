// What becomes of the best cosines: the average distance over the chosen ranks of the other images, found by selection
// instead of sorting, the distances themselves, and what these add up to over the chosen ranks of other references.
//
//   d[j, r, p]     = sqrt(max(0, 2 - 2 cos))           for the images j other than i
//   score[i, p]   += sum over r of weight[r] * sum over ranks first … last - 1 of d[:, r, p], ascending
//   minima[i, p, j] = sum over r of weight[r] * d[j, r, p],   infinity for j = i
//   sums[i, p]      = sum over ranks first[i] … last[i] - 1 of minima[i, p, :], ascending, over j that are kept, not i
//
// A zero feature has no direction: it lies at distance 1 from unit vectors (as if cos = 1/2) and at distance 0 from
// another zero feature (cos = 1).
//
// interval_average: grid (ceil(P / threads), images of the chunk), any block
//   best          [B, N, R, P] int: keys of the best cosines of images image_first … image_first + B - 1
//   inverse       [B, R, P] float: inverse lengths of the same images, 0 for a zero feature; none (a null pointer)
//                 where the keys follow the convention already, with has_zero 0 everywhere
//   has_zero      [N, R] bytes: 1 where an image has a zero feature
//   weight        [R] float: 1 / (last - first), shared among layers and degrees
//   scores        [N, P] float, added to
// minimum_distances: grid (ceil(P / 32) * ceil(N / 32), images of the chunk), whole warps, 4 * 32 * 33 bytes shared
//   best, inverse, has_zero as above; weight [R] float
//   minima        [B, P, N] float out
// kept_sums: grid (ceil(P / threads), images of the chunk), any block
//   minima        [B, P, N] float: distances of images image_first … image_first + B - 1, none negative
//   kept          [N] bytes: 1 where an image counts
//   ranks         [B, 2] int: first and last, 0 <= first < last <= images that count
//   sums          [B, P] double out
//
// Keys order like cosines, or against distances, so the largest `count` of them are the smallest distances. One thread
// per patch finds the count-th largest key by bisection between the extremes it has seen and then adds up what lies
// above it; neighbouring threads read neighbouring patches. Ranks equal to the threshold key are added as often as they
// are counted, so equal distances need no order. The sum runs over j in one order. Distances are handed out image by
// image along a row: a square of them is turned over in shared memory, so that both sides are read and written in whole
// lines.
// Bisection takes 25 or so passes over N values (estimate: the slab of one image stays in L2).
//
// Run: bound in scorer.py; tests/kernels/cuda/test_cuda_sources.py runs it on the host.
#include "device.h"

ZSAD_DEVICE float distance(int key) {
  const float squared = 2 - 2 * key_to_float(key);
  return squared > 0 ? squared * rsqrtf(squared) : 0.0f;
}

// The cosines of one patch with every other image.
struct Column {
  const int* best;
  const unsigned char* has_zero;
  long long step;
  int images, self, degrees;
  bool zero_here;

  ZSAD_DEVICE bool counts(int j) const { return j != self; }

  ZSAD_DEVICE int key(int j) const {
    const bool zero_there = has_zero[j * degrees];
    if (zero_here) return float_to_key(zero_there ? 1.0f : 0.5f);
    const int found = best[j * step];
    return zero_there ? max(found, float_to_key(0.5f)) : found;
  }

  ZSAD_DEVICE float value(int key) const { return distance(key); }
};

// The distances of one patch to the images that are kept.
struct Kept {
  const float* minima;
  const unsigned char* kept;
  int images, self;

  ZSAD_DEVICE bool counts(int j) const { return kept[j] && j != self; }
  ZSAD_DEVICE int key(int j) const { return -(__float_as_int(minima[j]) & 0x7fffffff); }  // zero may have a sign
  ZSAD_DEVICE float value(int key) const { return __int_as_float(-key); }
};

template <typename Distances>
ZSAD_DEVICE int count_above(const Distances& of, int threshold) {
  int above = 0;
  for (int j = 0; j < of.images; ++j) above += of.counts(j) && of.key(j) > threshold;
  return above;
}

// Sum of the `count` smallest distances, whose keys lie between lowest and highest.
template <typename Distances>
ZSAD_DEVICE double sum_of_nearest(const Distances& of, int count, int lowest, int highest) {
  if (count == 0) return 0;
  // The count-th largest key is the smallest t with fewer than `count` keys above it.
  while (lowest < highest) {
    const int middle = lowest + int((unsigned(highest) - unsigned(lowest)) / 2);
    if (count_above(of, middle) < count) highest = middle;
    else lowest = middle + 1;
  }
  double sum = 0;
  int above = 0;
  for (int j = 0; j < of.images; ++j) {
    if (!of.counts(j)) continue;
    const int k = of.key(j);
    if (k <= lowest) continue;
    sum += of.value(k);
    ++above;
  }
  return sum + double(count - above) * of.value(lowest);
}

// Sum of the distances of ranks first … last - 1.
template <typename Distances>
ZSAD_DEVICE double sum_of_ranks(const Distances& of, int first, int last) {
  int lowest = 0x7fffffff, highest = -0x7fffffff - 1;
  for (int j = 0; j < of.images; ++j) {
    if (!of.counts(j)) continue;
    const int k = of.key(j);
    lowest = min(lowest, k);
    highest = max(highest, k);
  }
  return sum_of_nearest(of, last, lowest, highest) - sum_of_nearest(of, first, lowest, highest);
}

ZSAD_KERNEL(256, 4)
interval_average(const int* best, const float* inverse, const unsigned char* has_zero, const float* weight, int images,
                 int degrees, int patches, int image_first, int first, int last, float* scores) {
  const int p = blockIdx.x * blockDim.x + threadIdx.x, i = image_first + blockIdx.y;
  if (p >= patches) return;
  double score = 0;
  for (int r = 0; r < degrees; ++r) {
    const long long slab = static_cast<long long>(degrees) * patches, at = static_cast<long long>(r) * patches + p;
    const Column column = {best + blockIdx.y * images * slab + at, has_zero + r, slab,
                           images, i, degrees, inverse && inverse[blockIdx.y * slab + at] == 0};
    score += weight[r] * sum_of_ranks(column, first, last);
  }
  scores[static_cast<long long>(i) * patches + p] += float(score);
}

constexpr int kSquare = 32;

ZSAD_KERNEL(256, 4)
minimum_distances(const int* best, const float* inverse, const unsigned char* has_zero, const float* weight, int images,
                  int degrees, int patches, int image_first, float* minima) {
  ZSAD_SHARED(float, square);  // [kSquare, kSquare + 1]: images, patches
  const int squares = (patches + kSquare - 1) / kSquare;
  const int p0 = blockIdx.x % squares * kSquare, j0 = blockIdx.x / squares * kSquare;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const int i = image_first + blockIdx.y, p = p0 + lane;
  const long long slab = static_cast<long long>(degrees) * patches;

  for (int row = warp; row < kSquare; row += warps) {
    const int j = j0 + row;
    if (j >= images || p >= patches) continue;
    float sum = __int_as_float(0x7f800000);  // infinity
    if (j != i) {
      sum = 0;
      for (int r = 0; r < degrees; ++r) {
        const long long at = static_cast<long long>(r) * patches + p;
        const Column column = {best + blockIdx.y * images * slab + at, has_zero + r, slab,
                               images, i, degrees, inverse && inverse[blockIdx.y * slab + at] == 0};
        sum += weight[r] * distance(column.key(j));
      }
    }
    square[row * (kSquare + 1) + lane] = sum;
  }
  __syncthreads();
  for (int row = warp; row < kSquare; row += warps) {
    const int q = p0 + row, j = j0 + lane;
    if (q >= patches || j >= images) continue;
    minima[(static_cast<long long>(blockIdx.y) * patches + q) * images + j] = square[lane * (kSquare + 1) + row];
  }
}

ZSAD_KERNEL(256, 4)
kept_sums(const float* minima, const unsigned char* kept, const int* ranks, int images, int patches, int image_first,
          double* sums) {
  const int p = blockIdx.x * blockDim.x + threadIdx.x, b = blockIdx.y;
  if (p >= patches) return;
  const long long at = static_cast<long long>(b) * patches + p;
  const Kept distances = {minima + at * images, kept, images, image_first + b};
  sums[at] = sum_of_ranks(distances, ranks[2 * b], ranks[2 * b + 1]);
}
