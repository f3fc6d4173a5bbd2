// Features of one degree for the fused products: box means over the patch grid in fp16, and their inverse lengths.
//
//   z[n, p]       = mean of x[n, q] over the (2 reach + 1)² neighbourhood of p, zero outside the grid, rounded
//   inverse[n, p] = 1 / || z[n, p] ||,   0 where the length is 0
//
// The product sees the rounded features, so the lengths must be theirs (as in pooled_norms.cu, which does without z).
//
// pool_features: grid (ceil(P / warps per block), N), whole warps
//   x             [N, P, C] fp16 bits, layer-normed; P = rows * columns
//   stride        of z, in channels: at least C, see fused.cu
//   z             [P, stride] fp16 bits out per image, image n at z + n * z_step; 0 from channel C on
//   inverse       [P] float out per image, inverse_step apart
//   has_zero      one byte per image, has_zero_step apart, zeroed before: set to 1 where a feature has no length
//
// One warp per patch, lanes over channels. Neighbouring patches share a block so that the neighbourhoods meet in L1.
// The mean stays in the range of the layer-normed tokens, where fp16 is at home, whatever the degree.
//
// Run: launch shapes in variants.py; tests/kernels/cuda/test_variants.py runs it on the host.
#include "device.h"

ZSAD_KERNEL(256, 4)
pool_features(const half_bits* x, int rows, int columns, int channels, int reach, int stride, half_bits* z,
              long long z_step, float* inverse, long long inverse_step, unsigned char* has_zero,
              long long has_zero_step) {
  const int patches = rows * columns, lane = threadIdx.x % kWarp;
  const int p = blockIdx.x * (blockDim.x / kWarp) + threadIdx.x / kWarp;
  if (p >= patches) return;  // a whole warp
  const int y0 = max(p / columns - reach, 0), y1 = min(p / columns + reach, rows - 1);
  const int x0 = max(p % columns - reach, 0), x1 = min(p % columns + reach, columns - 1);
  const half_bits* image = x + static_cast<long long>(blockIdx.y) * patches * channels;
  half_bits* feature = z + blockIdx.y * z_step + static_cast<long long>(p) * stride;
  const float share = 1.0f / float((2 * reach + 1) * (2 * reach + 1));

  float square = 0;
  for (int c = lane; c < stride; c += kWarp) {
    float sum = 0;
    if (c < channels)
      for (int yy = y0; yy <= y1; ++yy)
        for (int xx = x0; xx <= x1; ++xx)
          sum += half_to_float(image[(static_cast<long long>(yy) * columns + xx) * channels + c]);
    const half_bits rounded = float_to_half(sum * share);
    feature[c] = rounded;
    square += half_to_float(rounded) * half_to_float(rounded);
  }
  square = warp_sum(square);
  if (lane > 0) return;
  inverse[blockIdx.y * inverse_step + p] = square > 0 ? rsqrtf(square) : 0.0f;
  if (!(square > 0)) has_zero[blockIdx.y * has_zero_step] = 1;
}
