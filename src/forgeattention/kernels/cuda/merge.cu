// Attention over two disjoint sets of tokens to that over both. One warp per query.
//
// Macros: FORGE_DIM (head_dim), FORGE_TYPE (of the first part and the result).
#include "common.cuh"

constexpr int DIM = FORGE_DIM, WARPS = 8;

FORGE_KERNEL(32 * WARPS) merge(FORGE_PARAMS p) {
  const int row = blockIdx.x * WARPS + (threadIdx.x >> 5), lane = threadIdx.x & 31;
  if (row >= p.rows) return;
  const int token = row % p.n, head = row / p.n % p.heads, batch = row / p.n / p.heads;
  const float x = __ldg(p.a_lse + row), y = __ldg(p.b_lse + row), top = fmaxf(x, y), safe = top == NEG_INF ? 0.f : top;
  const float wa = __expf(x - safe), wb = __expf(y - safe), sum = wa + wb, inverse = sum > 0.f ? 1.f / sum : 0.f;
  const i64 from = batch * p.a_stride[0] + head * p.a_stride[1] + token * p.a_stride[2], to = (i64)row * DIM;
  for (int c = 2 * lane; c < DIM; c += 64)
#pragma unroll
    for (int i = 0; i < 2; ++i)
      store_element<FORGE_TYPE>(
          p.out, to + c + i,
          (wa * load_element<FORGE_TYPE>(p.a, from + c + i) + wb * __ldg(p.b + to + c + i)) * inverse);
  if (lane == 0) p.lse[row] = safe + __logf(sum);
}
