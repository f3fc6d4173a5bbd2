// Bilinear upsampling of patch scores to pixel maps; the corners of both grids coincide (align_corners = True).
//
//   source coordinate of output i = i * (in - 1) / (out - 1),   0 where out = 1
//
// upsample: grid (ceil(out_rows * out_columns / threads), N), any block
//   scores        [N, rows, columns] float
//   maps          [N, out_rows, out_columns] float out
//
// 1: first version; one thread per pixel, the scores stay in L1.
//
// Run: bound in device.py; tests/kernels/cuda/test_cuda_sources.py runs it on the host.
#include "device.h"

ZSAD_DEVICE void source_cell(int i, int in, int out, int& low, int& high, float& fraction) {
  const int steps = out > 1 ? out - 1 : 1, at = out > 1 ? i * (in - 1) : 0;
  low = at / steps;
  high = low + 1 < in ? low + 1 : low;
  fraction = float(at % steps) / steps;  // exact positions: a product of floats would be off by a few rounding errors
}

ZSAD_KERNEL(1024, 1)
upsample(const float* scores, int rows, int columns, float* maps, int out_rows, int out_columns) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= out_rows * out_columns) return;
  int y0, y1, x0, x1;
  float fy, fx;
  source_cell(i / out_columns, rows, out_rows, y0, y1, fy);
  source_cell(i % out_columns, columns, out_columns, x0, x1, fx);
  const float* s = scores + static_cast<long long>(blockIdx.y) * rows * columns;
  const float top = s[y0 * columns + x0] * (1 - fx) + s[y0 * columns + x1] * fx;
  const float bottom = s[y1 * columns + x0] * (1 - fx) + s[y1 * columns + x1] * fx;
  maps[static_cast<long long>(blockIdx.y) * out_rows * out_columns + i] = top * (1 - fy) + bottom * fy;
}
