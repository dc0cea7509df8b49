// Rotations of vectors that lie across a warp: element lane + 32 k of the vector is x[k] of that lane.
#pragma once
#include "common.cuh"

template <int DIM>
struct Rotate {
  static constexpr int E = DIM / 32;
  static constexpr bool DCT = E % 3 == 0;  // 96 = 32 x 3: Walsh-Hadamard over lanes, DCT-II over k
  static_assert(DCT ? E == 3 : (E & (E - 1)) == 0, "head_dim");

  static __device__ __forceinline__ void walsh_hadamard(float (&x)[E], int lane) {
#pragma unroll
    for (int bit = 1; bit < 32; bit <<= 1) {
      const float sign = lane & bit ? -1.f : 1.f;
#pragma unroll
      for (int k = 0; k < E; ++k) x[k] = fmaf(sign, x[k], __shfl_xor_sync(~0u, x[k], bit));
    }
    if constexpr (!DCT) {
#pragma unroll
      for (int step = 1; step < E; step <<= 1)
#pragma unroll
        for (int k = 0; k < E; ++k)
          if (!(k & step)) {
            const float a = x[k], b = x[k + step];
            x[k] = a + b;
            x[k + step] = a - b;
          }
    }
  }
  static __device__ __forceinline__ float norm() {
    return DCT ? 0.17677669529663687f : rsqrtf((float)DIM);  // 1 / sqrt(32)
  }
  static __device__ __forceinline__ void load_signs(const float* signs, int lane, float (&s)[E]) {
#pragma unroll
    for (int k = 0; k < E; ++k) s[k] = load_early<FLOAT>(signs, lane + 32 * k);
  }
  // x -> H diag(signs) x.
  static __device__ __forceinline__ void forward(float (&x)[E], const float (&signs)[E], int lane) {
#pragma unroll
    for (int k = 0; k < E; ++k) x[k] *= signs[k] * norm();
    walsh_hadamard(x, lane);
    if constexpr (DCT) {
      const float a = x[0], b = x[1], c = x[2];
      x[0] = 0.57735026918962576f * (a + b + c);
      x[1] = 0.70710678118654752f * (a - c);
      x[2] = 0.40824829046386302f * (a - 2.f * b + c);
    }
  }
  // x -> diag(signs) H^T x.
  static __device__ __forceinline__ void inverse(float (&x)[E], const float (&signs)[E], int lane) {
    if constexpr (DCT) {
      const float a = 0.57735026918962576f * x[0], b = 0.70710678118654752f * x[1], c = 0.40824829046386302f * x[2];
      x[0] = a + b + c;
      x[1] = a - 2.f * c;
      x[2] = a - b + c;
    }
    walsh_hadamard(x, lane);
#pragma unroll
    for (int k = 0; k < E; ++k) x[k] *= signs[k] * norm();
  }
  // x -> y with y[j] = sum_i m[i][j] x[i]; m row-major [DIM][DIM].
  static __device__ __forceinline__ void matrix(float (&x)[E], const float* m, int lane) {
    float y[E];
#pragma unroll
    for (int k = 0; k < E; ++k) y[k] = 0.f;
#pragma unroll
    for (int k = 0; k < E; ++k)
#pragma unroll 4
      for (int i = 0; i < 32; ++i) {
        const float xi = __shfl_sync(~0u, x[k], i);
        const float* row = m + (i64)(32 * k + i) * DIM + lane;
#pragma unroll
        for (int j = 0; j < E; ++j) y[j] = fmaf(__ldg(row + 32 * j), xi, y[j]);
      }
#pragma unroll
    for (int k = 0; k < E; ++k) x[k] = y[k];
  }
};

// One side's transform as a kernel is told of it.
// What a transform is told, loaded ahead of its use.
template <int DIM, int ROTATION>
struct Signs {
  float s[ROTATION == HADAMARD ? DIM / 32 : 1];
  __device__ __forceinline__ Signs(const TransformArgs& t, int head, int lane) {
    if constexpr (ROTATION == HADAMARD) Rotate<DIM>::load_signs(t.signs + head * t.stride, lane, s);
  }
};
template <int DIM, int ROTATION>
__device__ __forceinline__ void transform_in(float (&x)[DIM / 32], const TransformArgs& t,
                                             const Signs<DIM, ROTATION>& signs, int head, int lane) {
  if constexpr (ROTATION == HADAMARD) Rotate<DIM>::forward(x, signs.s, lane);
  if constexpr (ROTATION == MATRIX) Rotate<DIM>::matrix(x, t.in_matrix + head * t.stride, lane);
}
template <int DIM, int ROTATION>
__device__ __forceinline__ void transform_out(float (&x)[DIM / 32], const TransformArgs& t,
                                              const Signs<DIM, ROTATION>& signs, int head, int lane) {
  if constexpr (ROTATION == HADAMARD) Rotate<DIM>::inverse(x, signs.s, lane);
  if constexpr (ROTATION == MATRIX) Rotate<DIM>::matrix(x, t.out_matrix + head * t.stride, lane);
}
template <int DIM, int ROTATION>
__device__ __forceinline__ void transform_in(float (&x)[DIM / 32], const TransformArgs& t, int head, int lane) {
  transform_in<DIM, ROTATION>(x, t, Signs<DIM, ROTATION>(t, head, lane), head, lane);
}
template <int DIM, int ROTATION>
__device__ __forceinline__ void transform_out(float (&x)[DIM / 32], const TransformArgs& t, int head, int lane) {
  transform_out<DIM, ROTATION>(x, t, Signs<DIM, ROTATION>(t, head, lane), head, lane);
}
// q . mu of a head, before q is transformed; the same in every lane.
template <int DIM>
__device__ __forceinline__ float dot_mu(const float (&x)[DIM / 32], const TransformArgs& t, int head, int lane) {
  if (t.mu == nullptr) return 0.f;
  float sum = 0.f;
#pragma unroll
  for (int k = 0; k < DIM / 32; ++k) sum = fmaf(x[k], __ldg(t.mu + head * t.mu_stride + lane + 32 * k), sum);
  return warp_sum(sum);
}
