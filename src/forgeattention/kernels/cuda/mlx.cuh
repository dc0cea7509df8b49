// Entries for MLX, which passes pointers of inputs, pointers of outputs, then scalars of 32 bits, and no null pointer.
// backends/cuda/mlx.py passes them in this order; arrays are contiguous. What an argument means is said at Params.
#pragma once
#define FORGE_KERNEL(...) __device__ __forceinline__ void
#define FORGE_PARAMS const Params&

// A side's transform, of which what does not exist is some other array; `given` says whether `mu` does.
#define FORGE_TRANSFORM_ARRAYS(side) const float *side##_signs, const float *side##_in, const float *side##_out, const float *side##_mu
#define FORGE_TRANSFORM_SCALARS(side) int side##_given, int side##_stride, int side##_mu_stride
#define FORGE_TRANSFORM(side) \
  { side##_signs, side##_in, side##_out, side##_given ? side##_mu : nullptr, side##_stride, side##_mu_stride }
