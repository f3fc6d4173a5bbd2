// int8 codes of the features of one degree, one scale per patch, for the product that only chooses winners (fused.cu).
//
//   u[n, p]      = orthogonal transform of z[n, p]
//   scale        = max over c of |u[n, p, c]| / 127;   codes[n, p, c] = round(u[n, p, c] / scale)
//   weight[n, p] = scale * inverse[n, p]
//
// The transform, Walsh-Hadamard over every 32 channels, leaves all dot products as they are and spreads the few large
// channels that vision transformers have: patch scores of DINOv2 tokens then stray 3 to 6 times less from those of
// exact winners, at most 2.4e-3 in one layer and degree instead of 5.8e-3 (ViT-S, three sets of real images, NumPy).
//
// int8_quantise: grid (ceil(P / warps per block), N), whole warps
//   z             [P, stride] fp16 bits per image, image n at z + n * z_step (pool_features.cu)
//   stride        a multiple of 32
//   code_stride   at least stride and a multiple of 32, see fused.cu
//   inverse       [P] float per image, inverse_step apart
//   codes         [P, code_stride] signed bytes out per image, codes_step apart; 0 from channel `stride` on
//   weight        [P] float out per image, weight_step apart; 0 for a zero feature
//
// One warp per patch and one channel of a group of 32 per lane, so that the transform is five shuffles. The feature is
// read and transformed twice, the second time from L1, instead of being kept for an unknown number of channels.
//
// Run: launch shapes in variants.py; tests/kernels/cuda/test_variants.py runs it on the host.
#include "device.h"

constexpr float kCodes = 127;

// One channel of the transform of 32, times sqrt(32): a common factor, and the scale is taken after it.
ZSAD_DEVICE float transformed(float value) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int bit = 1; bit < kWarp; bit *= 2) {
    const float other = __shfl_xor_sync(kFullWarp, value, bit);
    value = lane & bit ? other - value : value + other;
  }
  return value;
}

ZSAD_KERNEL(256, 4)
int8_quantise(const half_bits* z, long long z_step, int patches, int stride, int code_stride, const float* inverse,
              long long inverse_step, signed char* codes, long long codes_step, float* weight, long long weight_step) {
  const int lane = threadIdx.x % kWarp;
  const int p = blockIdx.x * (blockDim.x / kWarp) + threadIdx.x / kWarp;
  if (p >= patches) return;  // a whole warp
  const half_bits* feature = z + blockIdx.y * z_step + static_cast<long long>(p) * stride;
  signed char* code = codes + blockIdx.y * codes_step + static_cast<long long>(p) * code_stride;

  float largest = 0;
  for (int c = lane; c < stride; c += kWarp) largest = fmaxf(largest, fabsf(transformed(half_to_float(feature[c]))));
  largest = warp_max(largest);
  const float per_code = largest > 0 ? kCodes / largest : 0.0f;
  for (int c = lane; c < code_stride; c += kWarp) {
    const float value = transformed(c < stride ? half_to_float(feature[c]) : 0.0f);
    code[c] = static_cast<signed char>(rintf(value * per_code));
  }
  // The transform is sqrt(32) times too long; so are the codes' dot products, by 32.
  const float scale = largest * (0.17677669529663687f / kCodes);
  if (lane == 0) weight[blockIdx.y * weight_step + p] = scale * inverse[blockIdx.y * inverse_step + p];
}
