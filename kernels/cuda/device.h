// What every kernel here needs beyond the language: fp16 as raw bits, ordered keys for floats, reductions, shared memory.
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
