// Tensor-core product of one image (columns) and a few others (rows) with the maxima taken on the spot, without a Gram.
//
//   cos[t, p, q]       = row_weights[t, p] * column_weights[q] * sum over c of rows[t, p, c] * column[q, c]
//   best_rows[t, p]    = max over q of cos;   best_columns[t, q] = max over p of cos
//
// fused_max_f16: fp16 features of one degree (pool_features.cu); the weights are their inverse lengths.
// fused_max_s8:  int8 codes (int8_quantise.cu); the weights are scale times inverse length. The cosines are approximate
//                and only choose: the maxima are of cos - 1 with the number of the winning patch in the lowest bits of
//                the mantissa, which int8_winners.cu reads and replaces by exact cosines.
// grid (ceil(P / 128)², T), 128 threads, shared memory SHARED_BYTES (variants.py)
//   rows            [P, stride] fp16 bits | signed bytes per image, image t at rows + t * image_step
//   column          [P, stride]
//   stride          channels, filled up with zeros to whole steps of 64 bytes; features start at multiples of 16 bytes
//   row_weights     [P] float per image, image t at row_weights + t * row_weights_step; 0 for a zero feature
//   column_weights  [P] float
//   best_rows       [P] int per image, image t at best_rows + t * rows_step; best_columns likewise. Keys of cosines
//                   (float_to_key), raised to the maximum: INT_MIN before the first launch. 0 drops a direction.
//   index_mask      fused_max_s8 only: the bits that hold a patch number, 2^b - 1 >= P - 1
//
// A block owns 128 x 128 entries of one image pair (tile.h), and two blocks fit on a multiprocessor.
//   - Patches past the end are copies of the last one: they change no maximum, so the epilogue does not mask either.
//   - Epilogue: maxima over a lane's entries, then over the lanes that share a row (or column), then through shared
//     memory over the warps that do; one atomic per row and column of the block. Maxima are exact in any order: the
//     result is deterministic.
// Estimates for P = 1369, C = 1024; nothing has been measured. The epilogue is 7 % (fp16) and 20 % (int8) of what the
// products take on an sm_80, where the other block does not hide it. Padding to 11 blocks costs 6 %. A pair reads 62 MB
// (fp16) or 31 MB (int8) out of L2: no limit on an RTX 4090, but on a H200 it holds fp16 to about half of the tensor
// peak, by wgmma too. Blocks of 128 x 256 read a fifth less at 9 % more padding; their size and the stages are what to
// vary.
//
// Run: launch shapes in variants.py; tests/kernels/cuda/test_variants.py runs it on the host.
#include "tile.h"

constexpr int kSpan = 128;  // patches of both sides per block
constexpr int kWarpsDown = Tile<kSpan>::warps_down, kThreads = Tile<kSpan>::threads;
static_assert(kSpan == kColumns && kThreads == kSpan, "a thread for each row's and each column's maximum");

struct Fused {
  const unsigned char* rows;
  long long image_bytes;
  const unsigned char* column;
  int patches, patch_bytes;
  const float* row_weights;
  long long row_weights_step;
  const float* column_weights;
  int* best_rows;
  long long rows_step;
  int* best_columns;
  long long columns_step;
  unsigned index_mask;
};

// Sums of fp16 products are cosines to the end; sums of codes choose a winner, whose number goes with the value.
template <class Sum>
struct Value;

template <>
struct Value<float> {
  static ZSAD_DEVICE float of(float sum, float row_weight, float column_weight) {
    return sum * row_weight * column_weight;
  }
  static ZSAD_DEVICE float with_index(float value, unsigned, int) { return value; }
};

template <>
struct Value<int> {
  // Near its winner a cosine is close to 1; less 1 it keeps its digits when the lowest bits go.
  static ZSAD_DEVICE float of(int sum, float row_weight, float column_weight) {
    return float(sum) * row_weight * column_weight - 1;
  }
  static ZSAD_DEVICE float with_index(float value, unsigned index_mask, int index) {
    return __int_as_float(int((unsigned(__float_as_int(value)) & ~index_mask) | unsigned(index)));
  }
};

// Raise the key of one of the block's patches, which start at `first`, to the maximum of what the warps have found:
// found[Warps][kSpan].
template <int Warps>
ZSAD_DEVICE void raise(const float* found, int first, int patches, int* best, long long step) {
  const int mine = threadIdx.x;
  if (!best || first + mine >= patches) return;
  float value = found[mine];
#pragma unroll
  for (int w = 1; w < Warps; ++w) value = fmaxf(value, found[w * kSpan + mine]);
  atomicMax(best + blockIdx.y * step + first + mine, float_to_key(value));
}

template <class Sum>
ZSAD_DEVICE void fused_max(const Fused& a) {
  ZSAD_SHARED(unsigned char, stages);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int spans = (a.patches + kSpan - 1) / kSpan;
  const int p0 = blockIdx.x / spans * kSpan, q0 = blockIdx.x % spans * kSpan;

  Sum sums[kRowSets][kColumnSets][4] = {};
  multiply_tile<kSpan>(
      stages, a.rows + blockIdx.y * a.image_bytes, [&](int row) { return min(p0 + row, a.patches - 1); }, a.column,
      [&](int row) { return min(q0 + row, a.patches - 1); }, a.patch_bytes, sums);

  float column_weight[kColumnSets][2], column_best[kColumnSets][2];
  int q[kColumnSets][2];
#pragma unroll
  for (int j = 0; j < kColumnSets; ++j)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      q[j][e] = min(q0 + set_column(j) + lane % 4 * 2 + e, a.patches - 1);
      column_weight[j][e] = a.column_weights[q[j][e]];
      column_best[j][e] = kLowest;
    }
  __syncthreads();  // the stages are read to the end and hold the warps' maxima from now on
  float* const row_found = reinterpret_cast<float*>(stages);     // [kWarpsAcross, kSpan]
  float* const column_found = row_found + kWarpsAcross * kSpan;  // [kWarpsDown, kSpan]
#pragma unroll
  for (int i = 0; i < kRowSets; ++i)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = set_row(i, half) + lane / 4, p = min(p0 + row, a.patches - 1);
      const float row_weight = a.row_weights[blockIdx.y * a.row_weights_step + p];
      float best = kLowest;
#pragma unroll
      for (int j = 0; j < kColumnSets; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float value = Value<Sum>::of(sums[i][j][2 * half + e], row_weight, column_weight[j][e]);
          best = fmaxf(best, Value<Sum>::with_index(value, a.index_mask, q[j][e]));
          column_best[j][e] = fmaxf(column_best[j][e], Value<Sum>::with_index(value, a.index_mask, p));
        }
#pragma unroll
      for (int other = 1; other < 4; other *= 2) best = fmaxf(best, __shfl_xor_sync(kFullWarp, best, other));
      if (lane % 4 == 0) row_found[warp % kWarpsAcross * kSpan + row] = best;
    }
#pragma unroll
  for (int j = 0; j < kColumnSets; ++j)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float best = column_best[j][e];
#pragma unroll
      for (int other = 4; other < kWarp; other *= 2) best = fmaxf(best, __shfl_xor_sync(kFullWarp, best, other));
      if (lane < 4) column_found[warp / kWarpsAcross * kSpan + set_column(j) + 2 * lane + e] = best;
    }
  __syncthreads();
  raise<kWarpsAcross>(row_found, p0, a.patches, a.best_rows, a.rows_step);
  raise<kWarpsDown>(column_found, q0, a.patches, a.best_columns, a.columns_step);
}

ZSAD_KERNEL(kThreads, 2)
fused_max_f16(const half_bits* rows, long long image_step, const half_bits* column, int patches, int stride,
              const float* row_weights, long long row_weights_step, const float* column_weights, int* best_rows,
              long long rows_step, int* best_columns, long long columns_step) {
  fused_max<float>({reinterpret_cast<const unsigned char*>(rows), 2 * image_step,
                    reinterpret_cast<const unsigned char*>(column), patches, 2 * stride, row_weights, row_weights_step,
                    column_weights, best_rows, rows_step, best_columns, columns_step, 0});
}

ZSAD_KERNEL(kThreads, 2)
fused_max_s8(const signed char* rows, long long image_step, const signed char* column, int patches, int stride,
             const float* row_weights, long long row_weights_step, const float* column_weights, int* best_rows,
             long long rows_step, int* best_columns, long long columns_step, unsigned index_mask) {
  fused_max<int>({reinterpret_cast<const unsigned char*>(rows), image_step,
                  reinterpret_cast<const unsigned char*>(column), patches, stride, row_weights, row_weights_step,
                  column_weights, best_rows, rows_step, best_columns, columns_step, index_mask});
}
