// The pages that fill in a step, in every layer of a paged engine at once: one layer's few pages would leave most of
// the device idle.
//
// A CTA takes every gridDim.x-th of layers x heads x pages. Macros: those of encode.cu.
#undef FORGE_KERNEL
#undef FORGE_PARAMS
#define FORGE_KERNEL(...) __device__ __forceinline__ void
#define FORGE_PARAMS const Params&
#include "encode.cu"

extern "C" __global__ void __launch_bounds__(THREADS, 1) encode_layers(const __grid_constant__ LayersParams q) {
  extern __shared__ __align__(16) u8 shared[];
  __shared__ __align__(16) u8 own[sizeof(Params)];
  const int per_fill = q.count * q.kv_heads, items = *q.fills * per_fill;
  for (int item = blockIdx.x; item < items; item += gridDim.x) {
    const int rest = item % per_fill, layer = rest / q.kv_heads;
    __syncthreads();
    for (int i = threadIdx.x; i < (int)sizeof(Params) / 4; i += THREADS)
      ((u32*)own)[i] = ((const u32*)(q.layers + layer))[i];
    __syncthreads();
    encode_page(*(const Params*)own, q.filled[item / per_fill], rest % q.kv_heads, shared);
  }
}
