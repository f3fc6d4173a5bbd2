// LayerNorm of each image over all patches and channels together, and the cast to fp16.
//
//   y[n, i] = (x[n, i] - mean_n) / sqrt(variance_n + epsilon),   i over P·C entries
//
// layer_norm_sums_{f32,f16}: grid (slices, N), whole warps, shared memory 8 bytes per warp
//   x             [N, size] float | fp16 bits; image n starts at x + n * image_step (in entries)
//   size          P·C
//   shift         [N] float out: the image's first entry, subtracted before squaring so that a large mean costs nothing
//   sums          [N, slices, 2] double out: sum and sum of squares of x - shift
// layer_norm_apply_{f32,f16}: grid (any, N), any block
//   y             [N, size] fp16 bits out
//   finite        [N] int out, zeroed before: 1 where the image's variance is finite
//
// The slices are added in one order by every block: the result does not depend on the schedule. Doubles hold the sums
// because one image has a million entries; there are few enough of them even for a GeForce's slow doubles.
// Two launches: the second recombines the slices itself.
//
// Run: bound in scorer.py; tests/kernels/cuda/test_cuda_sources.py runs it on the host.
#include "device.h"

ZSAD_DEVICE float load(const float* x) { return *x; }
ZSAD_DEVICE float load(const half_bits* x) { return half_to_float(*x); }

template <class T>
ZSAD_DEVICE void layer_norm_sums(const T* x, long long image_step, int size, float* shift, double* sums) {
  ZSAD_SHARED(double, scratch);
  const int n = blockIdx.y, slice = blockIdx.x, slices = gridDim.x;
  const T* image = x + n * image_step;
  const float first = load(image);
  double sum = 0, squares = 0;
  for (int i = slice * blockDim.x + threadIdx.x; i < size; i += slices * blockDim.x) {
    const double v = double(load(image + i)) - first;
    sum += v;
    squares += v * v;
  }
  sum = block_sum(sum, scratch);
  squares = block_sum(squares, scratch);
  if (threadIdx.x == 0) {
    double* mine = sums + (static_cast<long long>(n) * slices + slice) * 2;
    mine[0] = sum;
    mine[1] = squares;
    if (slice == 0) shift[n] = first;
  }
}

template <class T>
ZSAD_DEVICE void layer_norm_apply(const T* x, long long image_step, int size, const float* shift, const double* sums,
                                  int slices, float epsilon, half_bits* y, int* finite) {
  const int n = blockIdx.y;
  const double* mine = sums + static_cast<long long>(n) * slices * 2;
  double sum = 0, squares = 0;
  for (int s = 0; s < slices; ++s) {
    sum += mine[2 * s];
    squares += mine[2 * s + 1];
  }
  const double shifted_mean = sum / size, difference = squares / size - shifted_mean * shifted_mean;
  const double variance = difference < 0 ? 0 : difference;
  const float mean = float(shifted_mean + shift[n]), scale = float(1 / sqrt(variance + epsilon));
  if (blockIdx.x == 0 && threadIdx.x == 0) finite[n] = variance * 0 == 0;
  const T* image = x + n * image_step;
  half_bits* out = y + static_cast<long long>(n) * size;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < size; i += gridDim.x * blockDim.x)
    out[i] = float_to_half((load(image + i) - mean) * scale);
}

ZSAD_KERNEL(1024, 1)
layer_norm_sums_f32(const float* x, long long image_step, int size, float* shift, double* sums) {
  layer_norm_sums(x, image_step, size, shift, sums);
}

ZSAD_KERNEL(1024, 1)
layer_norm_sums_f16(const half_bits* x, long long image_step, int size, float* shift, double* sums) {
  layer_norm_sums(x, image_step, size, shift, sums);
}

ZSAD_KERNEL(1024, 1)
layer_norm_apply_f32(const float* x, long long image_step, int size, const float* shift, const double* sums, int slices,
                     float epsilon, half_bits* y, int* finite) {
  layer_norm_apply(x, image_step, size, shift, sums, slices, epsilon, y, finite);
}

ZSAD_KERNEL(1024, 1)
layer_norm_apply_f16(const half_bits* x, long long image_step, int size, const float* shift, const double* sums,
                     int slices, float epsilon, half_bits* y, int* finite) {
  layer_norm_apply(x, image_step, size, shift, sums, slices, epsilon, y, finite);
}
