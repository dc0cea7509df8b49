// Sums, maxima and prefix sums over a CTA of 1024 threads. `sums` is shared memory for one value of each warp.
#pragma once
#include "common.cuh"

constexpr int THREADS = 1024, WARPS = THREADS / 32;

// The sum or the largest over the CTA, in every thread.
template <class T, class Join>
__device__ __forceinline__ T block_join(T x, u64* sums, Join join) {
  const int thread = threadIdx.x;
#pragma unroll
  for (int i = 16; i; i >>= 1) x = join(x, __shfl_xor_sync(~0u, x, i));
  __syncthreads();
  if ((thread & 31) == 0) ((T*)sums)[thread >> 5] = x;
  __syncthreads();
  x = ((T*)sums)[thread & 31];
#pragma unroll
  for (int i = 16; i; i >>= 1) x = join(x, __shfl_xor_sync(~0u, x, i));
  return x;
}
template <class T>
__device__ __forceinline__ T block_sum(T x, u64* sums) {
  return block_join(x, sums, [](T a, T b) { return a + b; });
}
template <class T>
__device__ __forceinline__ T block_max(T x, u64* sums) {
  return block_join(x, sums, [](T a, T b) { return a > b ? a : b; });
}
// Sum over the threads up to this one.
template <class T>
__device__ __forceinline__ T block_scan(T x, u64* sums) {
  const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5;
#pragma unroll
  for (int i = 1; i < 32; i <<= 1) {
    const T other = __shfl_up_sync(~0u, x, i);
    if (lane >= i) x += other;
  }
  __syncthreads();
  if (lane == 31) ((T*)sums)[warp] = x;
  __syncthreads();
  for (int w = 0; w < warp; ++w) x += ((T*)sums)[w];
  return x;
}
