// Attention over parts of the packed tokens, joined by log-sum-exp and brought back to the model's coordinates. One
// warp per query.
//
// Macros: FORGE_DIM, FORGE_HEAD_DIM, FORGE_ROTATION.
#include "transform.cuh"

constexpr int DIM = FORGE_DIM, HEAD_DIM = FORGE_HEAD_DIM, E = DIM / 32, WARPS = 8;

extern "C" __global__ void __launch_bounds__(32 * WARPS) merge_parts(const __grid_constant__ Params p) {
  const int row = blockIdx.x * WARPS + (threadIdx.x >> 5), lane = threadIdx.x & 31;
  if (row >= p.rows) return;
  const int query = row % p.queries, head = row / p.queries % p.kv_heads, batch = row / p.queries / p.kv_heads;
  float top = p.first ? NEG_INF : p.lse[row];
  const float before = top;
  for (int i = 0; i < p.parts; ++i) top = fmaxf(top, __ldg(p.part_lse[i] + row));
  const float safe = top == NEG_INF ? 0.f : top;
  float x[E], sum = 0.f;
#pragma unroll
  for (int k = 0; k < E; ++k) x[k] = 0.f;
  if (!p.first) {
    sum = __expf(before - safe);
#pragma unroll
    for (int k = 0; k < E; ++k) x[k] = sum * p.sum[(i64)row * DIM + 32 * k + lane];
  }
  for (int i = 0; i < p.parts; ++i) {
    const float weight = __expf(__ldg(p.part_lse[i] + row) - safe);
    const i64 from = batch * p.stride[i][0] + head * p.stride[i][1] + query * p.stride[i][2];
    sum += weight;
#pragma unroll
    for (int k = 0; k < E; ++k) x[k] = fmaf(weight, load_element<HALF>(p.part[i], from + 32 * k + lane), x[k]);
  }
  const float inverse = sum > 0.f ? 1.f / sum : 0.f, lse = safe + __logf(sum);
#pragma unroll
  for (int k = 0; k < E; ++k) x[k] *= inverse;
  if (!p.last) {
#pragma unroll
    for (int k = 0; k < E; ++k) p.sum[(i64)row * DIM + 32 * k + lane] = x[k];
    if (lane == 0) p.lse[row] = lse;
    return;
  }
  transform_out<DIM, FORGE_ROTATION>(x, p.transform, head, lane);
#pragma unroll
  for (int k = 0; k < E; ++k) {
    const int c = 32 * k + lane;
    if (p.transform.mu) x[k] += __ldg(p.transform.mu + head * p.transform.mu_stride + c);
    if (c < HEAD_DIM) p.out[(i64)row * HEAD_DIM + c] = x[k];
  }
  if (lane == 0) p.lse[row] = lse + p.scale * p.shift[row];
}
