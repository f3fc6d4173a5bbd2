// Antialiased resize of a decoded image, bit for bit as Pillow does it, and the normalisation of the network's input.
//
//   one[y, x]    = round8(sum over k of image[.., first + k, ..] * weight[k])      along one axis
//   two[y, x]    = the same of `one` along the other axis
//   out[c, y, x] = (two[y, x, c] / 255 - mean[c]) / deviation[c]
//
// Weights are 22-bit fixed point (resize_weights in images.py makes them), sums are 32-bit integers and round8 clips
// to 0…255: exact arithmetic, so the result equals Pillow's for every filter. As the first pass rounds, the order of
// the axes matters in the last bit; the caller follows Pillow's.
//
// resize, resize_normalise: grid (ceil(columns of the output / threads), rows of the output), any block
//   image         [.., columns, 3] uint8
//   first         [n] int, count [n] int, weights [n, taps] int: for each of the n output rows or columns
//   vertical      1: along rows, 0: along columns
//   out_columns   columns of the output
//   out           [rows, out_columns, 3] uint8 out, or [3, rows, out_columns] float out
//   mean, deviation [3] float
//
// One thread per pixel of three channels.
//
// Run: bound in images.py; tests/kernels/cuda/test_cuda_sources.py runs it on the host.
#include "device.h"

constexpr int kFractionBits = 22;

ZSAD_DEVICE unsigned char round8(int sum) {
  const int value = sum >> kFractionBits;
  return static_cast<unsigned char>(value < 0 ? 0 : value > 255 ? 255 : value);
}

struct Taps {
  const int *first, *count, *weights;
  int taps;
};

ZSAD_DEVICE void weigh(const unsigned char* image, int columns, const Taps& taps, int vertical, int x, int y,
                       unsigned char* rgb) {
  const int along = vertical ? y : x, begin = taps.first[along];
  const long long step = vertical ? columns * 3LL : 3;
  const unsigned char* pixels = image + (vertical ? begin * step + x * 3LL : y * (columns * 3LL) + begin * step);
  const int* weights = taps.weights + along * taps.taps;
  const int half = 1 << (kFractionBits - 1);
  int sum[3] = {half, half, half};
  for (int k = 0; k < taps.count[along]; ++k)
    for (int c = 0; c < 3; ++c) sum[c] += pixels[k * step + c] * weights[k];
  for (int c = 0; c < 3; ++c) rgb[c] = round8(sum[c]);
}

ZSAD_KERNEL(1024, 1)
resize(const unsigned char* image, int columns, const int* first, const int* count, const int* weights, int taps,
       int vertical, int out_columns, unsigned char* out) {
  const int x = blockIdx.x * blockDim.x + threadIdx.x, y = blockIdx.y;
  if (x >= out_columns) return;
  weigh(image, columns, {first, count, weights, taps}, vertical, x, y,
        out + (static_cast<long long>(y) * out_columns + x) * 3);
}

ZSAD_KERNEL(1024, 1)
resize_normalise(const unsigned char* image, int columns, const int* first, const int* count, const int* weights,
                 int taps, int vertical, int out_columns, const float* mean, const float* deviation, float* out) {
  const int x = blockIdx.x * blockDim.x + threadIdx.x, y = blockIdx.y;
  if (x >= out_columns) return;
  unsigned char rgb[3];
  weigh(image, columns, {first, count, weights, taps}, vertical, x, y, rgb);
  for (int c = 0; c < 3; ++c)
    out[(static_cast<long long>(c) * gridDim.y + y) * out_columns + x] = (rgb[c] / 255.0f - mean[c]) / deviation[c];
}
