#include "mlx.cuh"

#include "qk_scores.cu"

extern "C" __global__ void __launch_bounds__(32 * WARPS)
    mlx_qk_scores(const void* q, const u8* base, const i64* offsets, const int* lengths, FORGE_TRANSFORM_ARRAYS(side), float* out,
            FORGE_TRANSFORM_SCALARS(side), int max_pages, int kv_heads, int group, int n, int queries, int blocks, int max_length, float scale, float unit) {
  Params p;
  p.q = q;
  p.base = base;
  p.offsets = offsets;
  p.lengths = lengths;
  p.out = out;
  p.transform = FORGE_TRANSFORM(side);
  p.q_stride[0] = (i64)kv_heads * queries * HEAD_DIM;
  p.q_stride[1] = (i64)n * HEAD_DIM;
  p.q_stride[2] = HEAD_DIM;
  p.max_pages = max_pages;
  p.kv_heads = kv_heads;
  p.group = group;
  p.n = n;
  p.queries = queries;
  p.blocks = blocks;
  p.max_length = max_length;
  p.scale = scale;
  p.unit = unit;
  qk_scores(p);
}
