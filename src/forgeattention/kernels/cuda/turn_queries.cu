// Queries into the coordinates of packed keys, for attention by other kernels over decoded pages. One warp per query.
//
// Macros: FORGE_DIM, FORGE_HEAD_DIM, FORGE_ROTATION, FORGE_TYPE (of q).
#include "transform.cuh"

constexpr int DIM = FORGE_DIM, HEAD_DIM = FORGE_HEAD_DIM, E = DIM / 32, WARPS = 8;

extern "C" __global__ void __launch_bounds__(32 * WARPS) turn_queries(const __grid_constant__ Params p) {
  const int row = blockIdx.x * WARPS + (threadIdx.x >> 5), lane = threadIdx.x & 31;
  if (row >= p.rows) return;
  const int token = row % p.n, q_head = row / p.n % p.q_heads, batch = row / p.n / p.q_heads, head = q_head / p.group;
  const i64 from = batch * p.q_stride[0] + q_head * p.q_stride[1] + token * p.q_stride[2];
  float x[E];
#pragma unroll
  for (int k = 0; k < E; ++k) {
    const int c = 32 * k + lane;
    x[k] = c < HEAD_DIM ? load_element<FORGE_TYPE>(p.q, from + c) : 0.f;
  }
  const float shift = dot_mu<DIM>(x, p.transform, head, lane);
  transform_in<DIM, FORGE_ROTATION>(x, p.transform, head, lane);
#pragma unroll
  for (int k = 0; k < E; ++k) store_element<HALF>(p.out, (i64)row * DIM + 32 * k + lane, x[k]);
  if (lane == 0) p.shift[row] = shift;
}
