// Inverse lengths of the box sums that every degree compares, taken from the rounded features.
//
//   inverse[n, r, p] = 1 / || sum of x[n, q] over the (2k_r + 1)² neighbourhood of p ||,   0 where the length is 0
//
// The product sees the rounded fp16 features, so the lengths must be theirs: with the lengths of the unrounded ones a
// patch's distance to itself would not be 0.
//
// pooled_norms: grid (ceil(P / warps per block), N), whole warps
//   x             [N, P, C] fp16 bits, P = rows * columns
//   reaches       [R] int, k_r = degree / 2, ascending
//   inverse       [N, R, P] float out
//   has_zero      [N, R] bytes, zeroed before: set to 1 where a feature of the image has no length
//
// One warp per patch, lanes over channels: a neighbourhood is read once, ring by ring, for all degrees; neighbouring
// patches share a block so that the neighbourhoods meet in L1.
//
// Run: bound in comparers.py; tests/kernels/cuda/test_cuda_sources.py runs it on the host.
#include "device.h"

constexpr int kMaxDegrees = 8;
constexpr float kZeroSquare = 1e-24f;

ZSAD_KERNEL(256, 4)
pooled_norms(const half_bits* x, int rows, int columns, int channels, const int* reaches, int degrees, float* inverse,
             unsigned char* has_zero) {
  const int patches = rows * columns, lane = threadIdx.x % kWarp;
  const int p = blockIdx.x * (blockDim.x / kWarp) + threadIdx.x / kWarp;
  if (p >= patches) return;  // a whole warp
  const int py = p / columns, px = p % columns;
  const half_bits* image = x + static_cast<long long>(blockIdx.y) * patches * channels;

  float squares[kMaxDegrees] = {};
  for (int c = lane; c < channels; c += kWarp) {
    float sum = 0;
    int ring = 0;
#pragma unroll
    for (int r = 0; r < kMaxDegrees; ++r) {
      if (r >= degrees) break;
      for (; ring <= reaches[r]; ++ring) {
        for (int dy = -ring; dy <= ring; ++dy) {
          const int y = py + dy;
          if (y < 0 || y >= rows) continue;
          const int step = ring == 0 || dy == -ring || dy == ring ? 1 : 2 * ring;  // a ring's inner rows have two cells
          for (int dx = -ring; dx <= ring; dx += step) {
            const int xx = px + dx;
            if (xx >= 0 && xx < columns)
              sum += half_to_float(image[(static_cast<long long>(y) * columns + xx) * channels + c]);
          }
        }
      }
      squares[r] += sum * sum;
    }
  }
#pragma unroll
  for (int r = 0; r < kMaxDegrees; ++r) {
    if (r >= degrees) break;
    const float square = warp_sum(squares[r]);
    if (lane > 0) continue;
    const long long at = static_cast<long long>(blockIdx.y) * degrees + r;
    inverse[at * patches + p] = square > kZeroSquare ? rsqrtf(square) : 0.0f;
    if (!(square > kZeroSquare)) has_zero[at] = 1;
  }
}
