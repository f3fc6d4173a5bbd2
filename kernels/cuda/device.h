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
// All shared memory is dynamic: one base pointer that the kernel divides itself.
#define ZSAD_SHARED(type, name)                                   \
  extern __shared__ __align__(16) unsigned char zsad_shared_memory[]; \
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

#endif  // ZSAD_HOST

constexpr unsigned kFullWarp = 0xffffffffu;
constexpr int kWarp = 32;
constexpr float kLowest = -3.402823466e38f;

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
