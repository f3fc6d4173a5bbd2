// A tile of products of the patches of two images on tensor cores: what fused.cu and tiled.cu have in common.
//
// A block multiplies 64 Down patches of one image (rows) with 128 of another (columns), 64 x 64 entries a warp: 128
// sums a thread, which leaves 127 of 255 registers. (With 64 x 32 a warp loads half as much again per product, which is
// all that shared memory gives on sm_80 and 90.) Channels pass in steps of 64 bytes, two multiply_add deep for either
// type. Three stages hold a step of both sides; while one is multiplied the next two are on their way (cp.async), with
// one barrier a step. With 2 warps down they take 48 KB, of which two fit the 100 KB of sm_86, 89 and 120.
//   - 16-byte piece c of row r lies at piece c ^ (r / 2 % 4): the 8 rows that a quarter of load_matrices reads are in
//     different banks, and so are the 8 pieces that 8 threads copy.
//   - Where there are fewer patches others stand in for them: neither the loop nor what comes after it masks loads.
#pragma once
#include "device.h"

constexpr int kWarpRows = 64, kWarpColumns = 64;
constexpr int kWarpsAcross = 2, kColumns = kWarpsAcross * kWarpColumns;
constexpr int kRowSets = kWarpRows / 16, kColumnSets = kWarpColumns / 8;  // of multiply_add in a warp

constexpr int kPiece = 16, kPieces = 4;  // bytes of a copy, copies of a patch's channels per step
constexpr int kStep = kPieces * kPiece;
constexpr int kDepth = 32;  // bytes of channels per multiply_add
constexpr int kStages = 3;

template <int Down>
struct Tile {
  static constexpr int rows = Down * kWarpRows, threads = Down * kWarpsAcross * kWarp;
  static constexpr int row_side = rows * kStep, stage = row_side + kColumns * kStep;  // bytes
};

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

// Multiply; which entries a lane holds afterwards: see multiply_add. Set (i, j) starts at row 16 i, column 8 j of the
// warp's, and the warp's at (warp / kWarpsAcross * kWarpRows, warp % kWarpsAcross * kWarpColumns).
//   stages  shared memory, kStages of Tile<Down>::stage bytes; others may still be reading it at the end
template <int Down, class Sum, class RowOf, class ColumnOf>
ZSAD_DEVICE void multiply_tile(unsigned char* stages, const unsigned char* rows, const RowOf& row_of,
                               const unsigned char* column, const ColumnOf& column_of, int patch_bytes,
                               Sum (&sums)[kRowSets][kColumnSets][4]) {
  using T = Tile<Down>;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int warp_row = warp / kWarpsAcross * kWarpRows, warp_column = warp % kWarpsAcross * kWarpColumns;
  const Loader<T::rows, T::threads> row_loader(rows, patch_bytes, row_of);
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
    __syncthreads();  // this step is there for all, and all have done with the stage that is filled next
    start_step(step + kStages - 1);
    const int row_side = step % kStages * T::stage, column_side = row_side + T::row_side;
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
}
