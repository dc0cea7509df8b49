#include "mlx.cuh"

#include "compact.cu"

extern "C" __global__ void __launch_bounds__(THREADS) mlx_compact(const u8* base, const i64* offsets, u8* out, int words) {
  Params p;
  p.base = base;
  p.offsets = offsets;
  p.out = out;
  p.words = words;
  compact(p);
}
