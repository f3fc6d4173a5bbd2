// Exact cosines in place of the approximate ones by which int8 products have chosen the winners.
//
//   q             = lowest bits of the value of best_rows[t, p]
//   best_rows     = key of row_inverse[t, p] * column_inverse[q] * sum over c of rows[t, p, c] * column[q, c]
//   best_columns  likewise, with the winner in image t
//
// winner_cosines: grid (ceil(P / warps per block), T), whole warps; arguments as for fused_max_f16 and fused_max_s8
//   rows            [P, stride] fp16 bits per image, stride a multiple of 8, image t at rows + t * image_step: features
//                   of one degree (pool_features.cu)
//   column          [P, stride]
//   row_inverse     [P] float per image, image t at row_inverse + t * row_inverse_step
//   column_inverse  [P] float
//   best_rows       [P] int per image: in, the keys of fused_max_s8; out, keys of cosines; 0 leaves a direction out
//
// Every winner is measured, not only those that the interval will select: interval_average.cu then needs no numbers of
// winners, and selects by exact distances. A winner is a read of one feature from anywhere in an image, and an image
// fits into L2. One warp per patch takes both directions; 16 bytes a lane. Estimate at P = 1369, C = 1024: 11 MB out of
// L2 per pair and degree, 3 MB of which come from memory (the rows' features, once), 2 to 3 µs.
//
// Run: launch shapes in variants.py; tests/kernels/cuda/test_variants.py runs it on the host.
#include "device.h"

constexpr int kHalves = 8;  // of one vector load

struct alignas(16) Halves {
  half_bits half[kHalves];
};

ZSAD_DEVICE float dot(const half_bits* a, const half_bits* b, int stride) {
  float sum = 0;
  for (int c = threadIdx.x % kWarp * kHalves; c < stride; c += kWarp * kHalves) {
    const Halves x = *reinterpret_cast<const Halves*>(a + c), y = *reinterpret_cast<const Halves*>(b + c);
#pragma unroll
    for (int i = 0; i < kHalves; ++i) sum += half_to_float(x.half[i]) * half_to_float(y.half[i]);
  }
  return warp_sum(sum);
}

// Measure the winner of one patch anew; `others` and their inverse lengths are the image that it lies in.
ZSAD_DEVICE void measure(int* best, const half_bits* feature, float inverse, const half_bits* others,
                         const float* inverse_others, int stride, unsigned index_mask) {
  const int winner = int(unsigned(__float_as_int(key_to_float(*best))) & index_mask);
  const float sum = dot(feature, others + static_cast<long long>(winner) * stride, stride);
  // By now every lane has read the winner.
  if (threadIdx.x % kWarp == 0) *best = float_to_key(sum * inverse * inverse_others[winner]);
}

ZSAD_KERNEL(256, 4)
winner_cosines(const half_bits* rows, long long image_step, const half_bits* column, int patches, int stride,
               const float* row_inverse, long long row_inverse_step, const float* column_inverse, int* best_rows,
               long long rows_step, int* best_columns, long long columns_step, unsigned index_mask) {
  const int p = blockIdx.x * (blockDim.x / kWarp) + threadIdx.x / kWarp;
  if (p >= patches) return;  // a whole warp
  const half_bits* image = rows + blockIdx.y * image_step;
  const float* inverse = row_inverse + blockIdx.y * row_inverse_step;
  const long long at = static_cast<long long>(p) * stride;
  if (best_rows) {
    int* const best = best_rows + blockIdx.y * rows_step + p;
    measure(best, image + at, inverse[p], column, column_inverse, stride, index_mask);
  }
  if (best_columns) {
    int* const best = best_columns + blockIdx.y * columns_step + p;
    measure(best, column + at, column_inverse[p], image, inverse, stride, index_mask);
  }
}
