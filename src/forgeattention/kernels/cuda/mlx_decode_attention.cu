#include "mlx.cuh"

#include "decode_attention.cu"

// `counter` is zero and this launch's alone, though an input to MLX.
extern "C" __global__ void __launch_bounds__(32 * WARPS, FORGE_CTAS)
    mlx_decode_attention(const void* q, const u8* base, const i64* offsets, const int* lengths, const void* exact_k, const void* exact_v,
                         const int* exact_lengths, const float* sink_logits, u32* counter, FORGE_TRANSFORM_ARRAYS(k), FORGE_TRANSFORM_ARRAYS(v),
                         void* out, float* lse, float* part, float2* part_ml, int sinks_given, FORGE_TRANSFORM_SCALARS(k),
                         FORGE_TRANSFORM_SCALARS(v), int capacity, int max_pages, int kv_heads, int group, int n, int queries, int blocks,
                         int causal, int chunks, int min_pages, int slots, int max_length, float scale_log2, float k_unit, float v_unit) {
  Params p;
  p.q = q;
  p.base = base;
  p.offsets = offsets;
  p.lengths = lengths;
  p.exact_k = exact_k;
  p.exact_v = exact_v;
  p.exact_lengths = exact_lengths;
  p.sink_logits = sinks_given ? sink_logits : nullptr;
  p.out = out;
  p.lse = lse;
  p.part = part;
  p.part_ml = part_ml;
  p.counter = counter;
  p.k_transform = FORGE_TRANSFORM(k);
  p.v_transform = FORGE_TRANSFORM(v);
  p.q_stride[0] = (i64)kv_heads * queries * HEAD_DIM;
  p.q_stride[1] = (i64)n * HEAD_DIM;
  p.q_stride[2] = HEAD_DIM;
  p.k_stride[0] = (i64)kv_heads * capacity * HEAD_DIM;
  p.k_stride[1] = (i64)capacity * HEAD_DIM;
  p.k_stride[2] = HEAD_DIM;
  p.v_stride[0] = (i64)kv_heads * capacity * HEAD_DIM;
  p.v_stride[1] = (i64)capacity * HEAD_DIM;
  p.v_stride[2] = HEAD_DIM;
  p.out_stride[0] = p.q_stride[0];
  p.out_stride[1] = p.q_stride[1];
  p.out_stride[2] = p.q_stride[2];
  p.exact_blocks = nullptr;
  p.exact_stride = 0;
  p.max_pages = max_pages;
  p.kv_heads = kv_heads;
  p.group = group;
  p.n = n;
  p.queries = queries;
  p.blocks = blocks;
  p.causal = causal;
  p.chunks = chunks;
  p.min_pages = min_pages;
  p.slots = slots;
  p.max_length = max_length;
  p.scale_log2 = scale_log2;
  p.k_unit = k_unit;
  p.v_unit = v_unit;
  decode_attention(p);
}
