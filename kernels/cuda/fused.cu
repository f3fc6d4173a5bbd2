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
// A block owns 128 x 128 entries of one image pair, its 4 warps 64 x 64 each: 128 sums a thread, and two blocks
// on a multiprocessor with up to 255 registers a thread. (With 64 x 32 a warp loads half as much again per product,
// which is all that shared memory gives on sm_80 and 90.) Channels pass in steps of 64 bytes, two multiply_add deep
// for either type. Three stages of 16 KB hold a step of both sides; while one is multiplied the next two are on
// their way (cp.async), with one barrier a step. With 48 KB two blocks also fit the 100 KB of sm_86, 89 and 120.
//   - 16-byte piece c of row r lies at piece c ^ (r / 2 % 4): the 8 rows that a quarter of load_matrices reads are in
//     different banks, and so are the 8 pieces that 8 threads copy.
//   - Patches past the end are copies of the last one: they change no maximum, so neither loop nor epilogue masks.
//   - Epilogue: maxima over a lane's entries, then over the lanes that share a row (or column), then through shared
//     memory over the warps that do; one atomic per row and column of the block. Maxima are exact in any order: the
//     result is deterministic.
// Estimates for P = 1369, C = 1024; nothing has been measured. The epilogue is 7 % (fp16) and 20 % (int8) of what the
// products take on an sm_80, where the other block does not hide it. Padding to 11 blocks costs 6 %. A pair reads 62 MB
// (fp16) or 31 MB (int8) out of L2: no limit on an RTX 4090, but on a H200 it holds fp16 to about half of the tensor
// peak. Blocks of 128 x 256 read a fifth less at 9 % more padding; their size and the stages are what to vary.
//
// Run: launch shapes in variants.py; tests/kernels/cuda/test_variants.py runs it on the host.
#include "device.h"

constexpr int kSpan = 128;  // patches of both sides per block
constexpr int kWarpRows = 64, kWarpColumns = 64;
constexpr int kWarpsDown = kSpan / kWarpRows, kWarpsAcross = kSpan / kWarpColumns;
constexpr int kThreads = kWarpsDown * kWarpsAcross * kWarp;
static_assert(kThreads == kSpan, "a thread for each row's and each column's maximum");
constexpr int kRowSets = kWarpRows / 16, kColumnSets = kWarpColumns / 8;  // of multiply_add in a warp

constexpr int kPiece = 16, kPieces = 4;  // bytes of a copy, copies of a patch's channels per step
constexpr int kStep = kPieces * kPiece;
constexpr int kDepth = 32;  // bytes of channels per multiply_add
constexpr int kStages = 3;
constexpr int kSide = kSpan * kStep;                 // bytes of one side of a stage
constexpr int kCopied = kSpan * kPieces / kThreads;  // pieces per thread and side
constexpr int kRowsApart = kThreads / kPieces;       // between the pieces of a thread

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

ZSAD_DEVICE int swizzled(int row, int piece) { return row * kStep + (piece ^ (row / 2 % kPieces)) * kPiece; }

// Copies one side of a step, patches `first` and following, to the byte `side` of the stages.
struct Loader {
  const unsigned char* source[kCopied];
  int target;

  ZSAD_DEVICE Loader(const unsigned char* image, int first, const Fused& a) {
    const int row = threadIdx.x / kPieces, piece = threadIdx.x % kPieces;
    target = swizzled(row, piece);
#pragma unroll
    for (int i = 0; i < kCopied; ++i) {
      const int patch = min(first + row + i * kRowsApart, a.patches - 1);
      source[i] = image + static_cast<long long>(patch) * a.patch_bytes + piece * kPiece;
    }
  }

  ZSAD_DEVICE void start(unsigned char* stages, int side, int step) const {
#pragma unroll
    for (int i = 0; i < kCopied; ++i)
      copy_async(stages, side + target + i * kRowsApart * kStep, source[i] + step * kStep);
  }
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
  ZSAD_SHARED(unsigned char, stages);  // [kStages, 2 sides, kSpan, kStep]
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int warp_row = warp / kWarpsAcross * kWarpRows, warp_column = warp % kWarpsAcross * kWarpColumns;
  const int spans = (a.patches + kSpan - 1) / kSpan;
  const int p0 = blockIdx.x / spans * kSpan, q0 = blockIdx.x % spans * kSpan;

  const Loader row_loader(a.rows + blockIdx.y * a.image_bytes, p0, a), column_loader(a.column, q0, a);
  const int steps = a.patch_bytes / kStep;
  const auto start_step = [&](int step) {
    if (step < steps) {
      const int stage = step % kStages * 2 * kSide;
      row_loader.start(stages, stage, step);
      column_loader.start(stages, stage + kSide, step);
    }
    close_copies();  // an empty group at the end keeps the count that wait_for_copies goes by
  };

  Sum sums[kRowSets][kColumnSets][4] = {};
#pragma unroll
  for (int step = 0; step < kStages - 1; ++step) start_step(step);
  for (int step = 0; step < steps; ++step) {
    wait_for_copies<kStages - 2>();
    __syncthreads();  // this step is there for all, and all have done with the stage that is filled next
    start_step(step + kStages - 1);
    const int row_side = step % kStages * 2 * kSide, column_side = row_side + kSide;
#pragma unroll
    for (int depth = 0; depth < kStep / kDepth; ++depth) {
      unsigned left[kRowSets][4], right[kColumnSets / 2][4];
      const int piece = depth * (kDepth / kPiece);
#pragma unroll
      for (int i = 0; i < kRowSets; ++i)
        load_matrices(left[i], stages, row_side + swizzled(warp_row + 16 * i + lane % 16, piece + lane / 16));
#pragma unroll
      for (int j = 0; j < kColumnSets / 2; ++j) {
        const int column = warp_column + 16 * j + lane / 16 * 8 + lane % 8;
        load_matrices(right[j], stages, column_side + swizzled(column, piece + lane / 8 % 2));
      }
#pragma unroll
      for (int i = 0; i < kRowSets; ++i)
#pragma unroll
        for (int j = 0; j < kColumnSets; ++j)
          multiply_add(sums[i][j], left[i], right[j / 2][j % 2 * 2], right[j / 2][j % 2 * 2 + 1]);
    }
  }

  // Which entries a lane holds: see multiply_add. Number e of a set is column 2t + e % 2 of row g + e / 2 * 8.
  float column_weight[kColumnSets][2], column_best[kColumnSets][2];
  int q[kColumnSets][2];
#pragma unroll
  for (int j = 0; j < kColumnSets; ++j)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      q[j][e] = min(q0 + warp_column + 8 * j + lane % 4 * 2 + e, a.patches - 1);
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
      const int row = warp_row + 16 * i + 8 * half + lane / 4, p = min(p0 + row, a.patches - 1);
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
      if (lane < 4) column_found[warp / kWarpsAcross * kSpan + warp_column + 8 * j + 2 * lane + e] = best;
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
