// A tile of products of the patches of two images on tensor cores: what fused.cu and tiled.cu have in common.
//
// A block multiplies `Rows` patches of one image with 128 of another, and has as many threads: 128 sums a thread, which
// leaves 127 of 255 registers. Channels pass in steps of 64 bytes, two products deep for either type. Three stages hold
// a step of both sides; while one is multiplied the next two are on their way (cp.async), with one barrier a step. With
// 128 rows they take 48 KB, of which two fit the 100 KB of sm_86, 89 and 120.
//   - 16-byte piece c of row r lies at piece c ^ (r / 2 % 4): the 8 rows that are read together are in different banks,
//     and so are the 8 pieces that 8 threads copy. It is the 64-byte swizzle that wgmma knows (k-major, repeating every
//     512 bytes), so that both ways to multiply read the same stages.
//   - Where there are fewer patches others stand in for them: neither the loop nor what comes after it masks loads.
//
// Two ways to multiply, which differ in what a warp has of the tile:
//   - multiply_add (mma.sync): 64 x 64 entries a warp, whose patches it loads into registers. (With 64 x 32 it loads
//     half as much again per product, which is all that shared memory gives on sm_80.)
//   - multiply_group (wgmma, for sm_90a, which is what compute capability 9.0 gets): four warps multiply 64 x 128
//     entries straight from shared memory, asynchronously; 32 x 128 are a warp's in the end, and no register holds a
//     factor.
// What that changes on a H200, by counts, for a step of 128 x 128 entries: the products take 256 cycles of a
// multiprocessor at the full rate of its tensor cores, which only wgmma has (mma.sync has two thirds of it, as others
// have measured). Shared memory passes 24 KB to the products instead of 32, beside 16 KB of copies: 320 cycles instead
// of 384. A warp executes 102 to 108 instructions instead of 159, four of them products, and mostly while those run.
// What L2 gives for the copies, some 32 bytes a cycle, takes 512 cycles and stays the limit. So stages are filled as
// early as they can be, which is why a step's products end before the next one's barrier: what the tensor cores then
// wait, another block of the multiprocessor (fused.cu) has for its own.
#pragma once
#include "device.h"

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
constexpr bool kGroups = true;
#else
constexpr bool kGroups = false;
#endif

constexpr int kColumns = 128;
constexpr int kWarpRows = kGroups ? 32 : 64, kWarpColumns = kGroups ? 128 : 64, kWarpsAcross = kColumns / kWarpColumns;
constexpr int kRowSets = kWarpRows / 16, kColumnSets = kWarpColumns / 8;  // 16 x 8 entries each

constexpr int kPiece = 16, kPieces = 4;  // bytes of a copy, copies of a patch's channels per step
constexpr int kStep = kPieces * kPiece;
constexpr int kDepth = 32;  // bytes of channels per product
constexpr int kStages = 3;

template <int Rows>
struct Tile {
  static constexpr int threads = Rows, warps_down = Rows / kWarpRows;
  static constexpr int row_side = Rows * kStep, stage = row_side + kColumns * kStep;  // bytes
};

// Which entries of the tile a lane holds: with g = lane / 4 and t = lane % 4, sums[i][j][2 * half + e] is that of row
// set_row(i, half) + g and column set_column(j) + 2t + e.
ZSAD_DEVICE int set_row(int i, int half) {
  const int first = threadIdx.x / kWarp / kWarpsAcross * kWarpRows;
  return first + (kGroups ? 8 * i + 16 * half : 16 * i + 8 * half);
}
ZSAD_DEVICE int set_column(int j) { return threadIdx.x / kWarp % kWarpsAcross * kWarpColumns + 8 * j; }

ZSAD_DEVICE int swizzled(int row, int piece) { return row * kStep + (piece ^ (row / 2 % kPieces)) * kPiece; }

// Copies one side of a step, `Rows` patches, to the byte `side` of the stages.
template <int Rows, int Threads>
struct Loader {
  static constexpr int copied = Rows * kPieces / Threads;  // pieces per thread
  static constexpr int apart = Threads / kPieces;          // rows between them
  const unsigned char* source[copied];
  int target;

  // patch_of(r): the patch in row r.
  template <class PatchOf>
  ZSAD_DEVICE Loader(const unsigned char* image, int patch_bytes, const PatchOf& patch_of) {
    const int row = threadIdx.x / kPieces, piece = threadIdx.x % kPieces;
    target = swizzled(row, piece);
#pragma unroll
    for (int i = 0; i < copied; ++i)
      source[i] = image + static_cast<long long>(patch_of(row + i * apart)) * patch_bytes + piece * kPiece;
  }

  ZSAD_DEVICE void start(unsigned char* stages, int side, int step) const {
#pragma unroll
    for (int i = 0; i < copied; ++i)
      copy_async(stages, side + target + i * apart * kStep, source[i] + step * kStep);
  }
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// Start multiplying a step. Product i takes the rows 8 i + 16 k + 0 to 7 for k = 0 to 7; two of these runs are a
// warp's, the halves of its set i.
template <class Sum>
ZSAD_DEVICE void multiply_step(const unsigned char* stages, int row_side, int column_side,
                               Sum (&sums)[kRowSets][kColumnSets][4]) {
  constexpr int kGroupWarps = 4, kRun = 8 * kStep;  // bytes of 8 rows
  const int group_side = row_side + threadIdx.x / (kGroupWarps * kWarp) * kGroupWarps * kWarpRows * kStep;
  order_sums(sums);
#pragma unroll
  for (int depth = 0; depth < kStep; depth += kDepth)
#pragma unroll
    for (int i = 0; i < kRowSets; ++i)
      multiply_group(sums[i], swizzled_rows(stages, group_side + i * kRun + depth, 2 * kRun),
                     swizzled_rows(stages, column_side + depth, kRun));
  close_products();
}

#else

// Multiply a step.
template <class Sum>
ZSAD_DEVICE void multiply_step(const unsigned char* stages, int row_side, int column_side,
                               Sum (&sums)[kRowSets][kColumnSets][4]) {
  const int lane = threadIdx.x % kWarp, warp_row = set_row(0, 0), warp_column = set_column(0);
#pragma unroll
  for (int depth = 0; depth < kStep / kDepth; ++depth) {
    unsigned left[kRowSets][4], right[kColumnSets / 2][4];
    const int piece = depth * (kDepth / kPiece);
#pragma unroll
    for (int i = 0; i < kRowSets; ++i)
      load_matrices(left[i], stages, row_side + swizzled(warp_row + 16 * i + lane % 16, piece + lane / 16));
#pragma unroll
    for (int j = 0; j < kColumnSets / 2; ++j) {
      const int patch = warp_column + 16 * j + lane / 16 * 8 + lane % 8;
      load_matrices(right[j], stages, column_side + swizzled(patch, piece + lane / 8 % 2));
    }
#pragma unroll
    for (int i = 0; i < kRowSets; ++i)
#pragma unroll
      for (int j = 0; j < kColumnSets; ++j)
        multiply_add(sums[i][j], left[i], right[j / 2][j % 2 * 2], right[j / 2][j % 2 * 2 + 1]);
  }
}

// What wgmma alone has to wait for and to show.
template <class Sum>
ZSAD_DEVICE void wait_for_products(Sum (&)[kRowSets][kColumnSets][4]) {}
ZSAD_DEVICE void show_copies() {}

#endif

// Multiply; `sums` start at any values.
//   stages  shared memory, kStages of Tile<Rows>::stage bytes; others may still be reading it at the end
template <int Rows, class Sum, class RowOf, class ColumnOf>
ZSAD_DEVICE void multiply_tile(unsigned char* stages, const unsigned char* rows, const RowOf& row_of,
                               const unsigned char* column, const ColumnOf& column_of, int patch_bytes,
                               Sum (&sums)[kRowSets][kColumnSets][4]) {
  using T = Tile<Rows>;
  const Loader<Rows, T::threads> row_loader(rows, patch_bytes, row_of);
  const Loader<kColumns, T::threads> column_loader(column, patch_bytes, column_of);
  const int steps = patch_bytes / kStep;
  const auto start_step = [&](int step) {
    if (step < steps) {
      const int stage = step % kStages * T::stage;
      row_loader.start(stages, stage, step);
      column_loader.start(stages, stage + T::row_side, step);
    }
    close_copies();  // an empty group at the end keeps the count that wait_for_copies goes by
  };

#pragma unroll
  for (int step = 0; step < kStages - 1; ++step) start_step(step);
  for (int step = 0; step < steps; ++step) {
    wait_for_copies<kStages - 2>();
    show_copies();
    wait_for_products(sums);
    __syncthreads();  // this step is there for all, and all have done with the stage that is filled next
    if (!kGroups) start_step(step + kStages - 1);
    const int row_side = step % kStages * T::stage;
    multiply_step(stages, row_side, row_side + T::row_side, sums);
    if (kGroups) start_step(step + kStages - 1);  // while the products are under way
  }
  wait_for_products(sums);
}
