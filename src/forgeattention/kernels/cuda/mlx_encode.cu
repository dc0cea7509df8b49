#include "mlx.cuh"

#include "encode.cu"

// `bad` is zero before.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
    mlx_encode(const void* k, const void* v, const i64* offsets, FORGE_TRANSFORM_ARRAYS(k), FORGE_TRANSFORM_ARRAYS(v), u8* base, int* bad,
               FORGE_TRANSFORM_SCALARS(k), FORGE_TRANSFORM_SCALARS(v), int tokens, float k_unit, float v_unit) {
  Params p;
  p.k = k;
  p.v = v;
  p.base = base;
  p.offsets = offsets;
  p.slots = nullptr;
  p.bad = bad;
  p.k_transform = FORGE_TRANSFORM(k);
  p.v_transform = FORGE_TRANSFORM(v);
  p.k_stride[0] = forge::PAGE * HEAD_DIM;
  p.k_stride[1] = (i64)tokens * HEAD_DIM;
  p.k_stride[2] = HEAD_DIM;
  p.v_stride[0] = forge::PAGE * HEAD_DIM;
  p.v_stride[1] = (i64)tokens * HEAD_DIM;
  p.v_stride[2] = HEAD_DIM;
  p.exact_block = 0;
  p.k_unit = k_unit;
  p.v_unit = v_unit;
  encode(p);
}
