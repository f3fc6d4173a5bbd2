// What every kernel here needs beyond the language: fp16 as raw bits, ordered keys for floats, reductions, shared
// memory, and the instructions of tensor cores and asynchronous copies (sm_80 and later).
//
// No CUDA header is included, so NVRTC compiles the sources with nothing but this folder on its include path. With
// ZSAD_HOST the same sources compile as C++17 (host/cuda_host.h), which is how they are tested without a GPU.
#pragma once

#ifdef ZSAD_HOST
#include "host/cuda_host.h"
#else

// The blocks per multiprocessor bound the registers from above; without them ptxas may spill to fit more blocks.
#define ZSAD_KERNEL(max_threads, min_blocks) extern "C" __global__ void __launch_bounds__(max_threads, min_blocks)
#define ZSAD_DEVICE __device__ __forceinline__
// All shared memory is dynamic: one base pointer that the kernel divides itself. Aligned as a 64-byte swizzle repeats.
#define ZSAD_SHARED(type, name)                                        \
  extern __shared__ __align__(512) unsigned char zsad_shared_memory[]; \
  type* const name = reinterpret_cast<type*>(zsad_shared_memory)

typedef unsigned short half_bits;

ZSAD_DEVICE float half_to_float(half_bits h) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
  return f;
}

ZSAD_DEVICE half_bits float_to_half(float f) {
  half_bits h;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f));
  return h;
}

ZSAD_DEVICE unsigned shared_address(const void* pointer) {
  unsigned address;
  asm("{ .reg .u64 wide; cvta.to.shared.u64 wide, %1; cvt.u32.u64 %0, wide; }" : "=r"(address) : "l"(pointer));
  return address;
}

// Have a pointer computed here once and kept in registers, rather than anew wherever it is used.
ZSAD_DEVICE void keep(const float*& pointer) { asm volatile("" : "+l"(pointer)); }

// Have sums in their registers here, neither moved before nor after.
ZSAD_DEVICE void keep(float& sum) { asm volatile("" : "+f"(sum)::"memory"); }
ZSAD_DEVICE void keep(int& sum) { asm volatile("" : "+r"(sum)::"memory"); }
template <class Sum, int Count>
ZSAD_DEVICE void keep(Sum (&sums)[Count]) {
#pragma unroll
  for (int i = 0; i < Count; ++i) keep(sums[i]);
}

// Load from global memory if wanted, and leave the register alone otherwise.
ZSAD_DEVICE void load_if(bool wanted, const float* from, float& value) {
  asm volatile("{ .reg .pred wanted; setp.ne.s32 wanted, %2, 0; @wanted ld.global.f32 %0, [%1]; }"
               : "+f"(value)
               : "l"(from), "r"(int(wanted)));
}

// Places in shared memory are given as a base and an offset in bytes: the sum of 32 bits costs less than one of 64.

// Start copying 16 bytes to shared memory past the registers and L1; both places are multiples of 16.
ZSAD_DEVICE void copy_async(void* shared, int offset, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared) + offset), "l"(global)
               : "memory");
}

// Close the group of the copies that this thread has started since it closed the last one.
ZSAD_DEVICE void close_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Wait until all but the thread's last `Open` groups have landed. Other threads see them after the next barrier.
template <int Open>
ZSAD_DEVICE void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Open) : "memory");
}

// Load four 8 x 16-byte matrices from shared memory into a warp: lane l brings the place of row l % 8 of matrix l / 8
// and receives of each matrix m the 4 bytes from 4 * (l % 4) on of row l / 4, in out[m].
ZSAD_DEVICE void load_matrices(unsigned (&out)[4], const void* shared, int offset) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_address(shared) + offset)
               : "memory");
}

// sums[16, 8] += a[16, 32 bytes] * b[8, 32 bytes] transposed, on the tensor cores of a warp. With g = lane / 4 and
// t = lane % 4 a lane holds
//   sums  entries (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1)
//   a     4 bytes each of row g, row g + 8 from byte 4t on, then of the same rows from byte 16 + 4t on
//   b0    4 bytes of row g from byte 4t on;  b1  from byte 16 + 4t on
// which is how load_matrices leaves them. Float sums take fp16 factors, integer sums signed bytes.
ZSAD_DEVICE void multiply_add(float (&sums)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

ZSAD_DEVICE void multiply_add(int (&sums)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// Products of a warpgroup: four warps, the first of them a multiple of four, execute all of these together.

// Let this thread's copies that have landed be seen by the products that start after the next barrier.
ZSAD_DEVICE void show_copies() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Order what this thread has done with its sums before the products that it starts next.
template <class Sum, int Sets, int Columns>
ZSAD_DEVICE void order_sums(Sum (&sums)[Sets][Columns][4]) {
  keep(sums);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

#define ZSAD_SET(how, j) how(sums[j][0]), how(sums[j][1]), how(sums[j][2]), how(sums[j][3])
#define ZSAD_FOUR_SETS(how, j) ZSAD_SET(how, j), ZSAD_SET(how, j + 1), ZSAD_SET(how, j + 2), ZSAD_SET(how, j + 3)
#define ZSAD_SETS(how) \
  ZSAD_FOUR_SETS(how, 0), ZSAD_FOUR_SETS(how, 4), ZSAD_FOUR_SETS(how, 8), ZSAD_FOUR_SETS(how, 12)
#define ZSAD_MULTIPLY_GROUP(instruction, how, scales)                                                 \
  asm volatile("{ .reg .pred add; setp.ne.s32 add, 1, 0; wgmma.mma_async.sync.aligned." instruction   \
               " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "             \
               "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "     \
               "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "     \
               "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "    \
               "%64, %65, add" scales "; }"                                                           \
               : ZSAD_SETS(how)                                                                       \
               : "l"(a), "l"(b)                                                                       \
               : "memory")

// sums[64, 128] += a[64, 32 bytes] * b[128, 32 bytes] transposed, some time before wait_for_products returns; until
// then neither sums nor a and b may be touched. Warp w of the four has rows 16 w + 0 to 15, in sets of 8 columns of
// which a lane holds what multiply_add says.
ZSAD_DEVICE void multiply_group(float (&sums)[16][4], unsigned long long a, unsigned long long b) {
  ZSAD_MULTIPLY_GROUP("m64n128k16.f32.f16.f16", "+f", ", 1, 1, 0, 0");
}

ZSAD_DEVICE void multiply_group(int (&sums)[16][4], unsigned long long a, unsigned long long b) {
  ZSAD_MULTIPLY_GROUP("m64n128k32.s32.s8.s8", "+r", "");
}

// Close the group of the products that this warpgroup has started since it closed the last one.
ZSAD_DEVICE void close_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Wait until all products have ended whose groups are closed.
template <class Sum, int Sets, int Columns>
ZSAD_DEVICE void wait_for_products(Sum (&sums)[Sets][Columns][4]) {
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
  keep(sums);
}

#endif  // __CUDA_ARCH_FEAT_SM90_ALL
#endif  // ZSAD_HOST

constexpr unsigned kFullWarp = 0xffffffffu;
constexpr int kWarp = 32;
constexpr float kLowest = -3.402823466e38f;

// Describe rows of 64 bytes in shared memory to multiply_group: runs of 8 rows, `apart` bytes from one to the next,
// whose pieces of 16 bytes are swizzled by 64 bytes; `offset` may lie within a row, for the channels from there on.
ZSAD_DEVICE unsigned long long swizzled_rows(const void* shared, int offset, int apart) {
  const unsigned start = shared_address(shared) + offset;
  return (start & 0x3ffff) >> 4 | static_cast<unsigned long long>(apart >> 4) << 32 | 2ull << 62;
}

// Integers that compare like the floats they come from, so that integer maxima (redux, atomicMax) serve floats.
ZSAD_DEVICE int float_to_key(float f) {
  const int bits = __float_as_int(f);
  return bits ^ ((bits >> 31) & 0x7fffffff);
}

ZSAD_DEVICE float key_to_float(int key) { return __int_as_float(key ^ ((key >> 31) & 0x7fffffff)); }

template <class T>
ZSAD_DEVICE T warp_sum(T value) {
  for (int lane = kWarp / 2; lane > 0; lane /= 2) value += __shfl_xor_sync(kFullWarp, value, lane);
  return value;
}

ZSAD_DEVICE float warp_max(float value) {
  for (int lane = kWarp / 2; lane > 0; lane /= 2) value = fmaxf(value, __shfl_xor_sync(kFullWarp, value, lane));
  return value;
}

// Sum over the block in a fixed order, on every thread. scratch: one T per warp; whole warps only.
template <class T>
ZSAD_DEVICE T block_sum(T value, T* scratch) {
  const int warps = blockDim.x / kWarp;
  value = warp_sum(value);
  __syncthreads();  // scratch may still be read from an earlier sum
  if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = value;
  __syncthreads();
  T total = 0;
  for (int w = 0; w < warps; ++w) total += scratch[w];
  return total;
}
