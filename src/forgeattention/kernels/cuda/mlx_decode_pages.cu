#include "mlx.cuh"

#include "decode_pages.cu"

extern "C" __global__ void __launch_bounds__(THREADS)
    mlx_decode_pages(const u8* base, const i64* offsets, const int* lengths, FORGE_TRANSFORM_ARRAYS(k), FORGE_TRANSFORM_ARRAYS(v), void* k, void* v,
                     FORGE_TRANSFORM_SCALARS(k), FORGE_TRANSFORM_SCALARS(v), int max_pages, int kv_heads, int max_length, float k_unit,
                     float v_unit) {
  Params p;
  p.base = base;
  p.offsets = offsets;
  p.lengths = lengths;
  p.k = k;
  p.v = v;
  p.k_transform = FORGE_TRANSFORM(k);
  p.v_transform = FORGE_TRANSFORM(v);
  p.max_pages = max_pages;
  p.kv_heads = kv_heads;
  p.max_length = max_length;
  p.k_unit = k_unit;
  p.v_unit = v_unit;
  decode_pages(p);
}
