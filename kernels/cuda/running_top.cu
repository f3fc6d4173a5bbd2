// The largest products of every row, while chunk after chunk of columns passes by.
//
//   keys[p, :], indices[p, :] = the K largest of what they held and of products[p, 0 .. columns), in any order; column
//                               c counts as number first + c, and of equal ones those that came first stay
//
// running_top: grid (ceil(rows / warps per block), 1), whole warps
//   products  [rows, stride] float
//   keys      [rows, K] int, K at most 32: keys of floats (device.h); before the first chunk the lowest int
//   indices   [rows, K] int; before the first chunk -1, -2, ... -K
//
// One warp per row. Lane l keeps the l-th entry in registers; what does not exceed the smallest of them, and after the
// first chunks hardly anything does, costs a comparison. So a chunk is one read: 67 MB at 2048 x 8192, about 20 µs from
// the memory of an H200 and less where the product left it in L2 (an estimate).
//
// Run: launch shape in nearest.py; tests/kernels/cuda/test_nearest.py runs it on the host.
#include "device.h"

constexpr int kAhead = 4;  // loads on their way at once
constexpr int kNone = -0x7fffffff - 1, kNeverSmallest = 0x7fffffff;

ZSAD_DEVICE int warp_largest(int value) { return __reduce_max_sync(kFullWarp, value); }

ZSAD_DEVICE int warp_smallest(int value) { return ~__reduce_max_sync(kFullWarp, ~value); }

// An entry of a row for each lane, and the smallest key of all.
struct Kept {
  int key, index, smallest;
};

// Put a warp's candidates, one per lane and in the order of the lanes, in the place of smaller entries.
ZSAD_DEVICE void take(Kept& kept, int candidate, int column) {
  for (;;) {
    const int best = warp_largest(candidate);
    if (best <= kept.smallest) return;  // the whole warp
    const int winner = warp_smallest(candidate == best ? column : kNeverSmallest);
    // Of equal entries the last to come goes.
    const int last = warp_largest(kept.key == kept.smallest ? kept.index : kNone);
    if (kept.key == kept.smallest && kept.index == last) {
      kept.key = best;
      kept.index = winner;
    }
    if (column == winner) candidate = kNone;
    kept.smallest = warp_smallest(kept.key);
  }
}

ZSAD_KERNEL(256, 4)
running_top(const float* products, int stride, int rows, int columns, int first, int* keys, int* indices, int kept) {
  const int row = blockIdx.x * (blockDim.x / kWarp) + threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  if (row >= rows) return;  // a whole warp
  const float* const mine = products + static_cast<long long>(row) * stride;
  const long long at = static_cast<long long>(row) * kept + lane;
  Kept held = {kNeverSmallest, kNone, 0};
  if (lane < kept) {
    held.key = keys[at];
    held.index = indices[at];
  }
  held.smallest = warp_smallest(held.key);
  for (int column = 0; column < columns; column += kAhead * kWarp) {
    int candidates[kAhead], best = kNone;
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int c = column + i * kWarp + lane;
      candidates[i] = c < columns ? float_to_key(mine[c]) : kNone;
      best = max(best, candidates[i]);
    }
    if (warp_largest(best) <= held.smallest) continue;
#pragma unroll
    for (int i = 0; i < kAhead; ++i) take(held, candidates[i], first + column + i * kWarp + lane);
  }
  if (lane < kept) {
    keys[at] = held.key;
    indices[at] = held.index;
  }
}
