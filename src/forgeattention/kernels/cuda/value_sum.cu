// Sums of packed values with given weights of any sign. Grid: (splits, kv_heads * query_tiles, rows); a split takes
// every splits-th run of WARPS pages and writes its own sum, already rotated back; the launcher adds the splits.
#include "scores_args.cuh"

FORGE_KERNEL(32 * WARPS) value_sum(FORGE_PARAMS p) {
  extern __shared__ __align__(16) u8 shared[];  // parts [WARPS][RECORD]; then sums [WARPS][QUERIES][DIM + 1]
  __shared__ __align__(16) u32 words[CONSTANT_WORDS];
  __shared__ float scales[WARPS][forge::PAGE];
  const int thread = thread_index(), warp = thread >> 5, lane = thread & 31, g = lane >> 2, t = lane & 3;
  const int row = blockIdx.z, head = blockIdx.y / p.query_tiles, first = blockIdx.y % p.query_tiles * QUERIES;
  const int length = __ldg(p.lengths + row), query = first + g;
  if (thread == 0) Constants::store(words);
  __syncthreads();
  const Constants constants(words);
  const float* weights = (const float*)p.q + (((i64)row * p.kv_heads + head) * p.queries + query) * p.max_length;
  u8* part = shared + warp * RECORD;
  float acc[DIM / 4], mass = 0.f;
#pragma unroll
  for (int i = 0; i < DIM / 4; ++i) acc[i] = 0.f;
  for (int page = blockIdx.x * WARPS + warp; page * forge::PAGE < length; page += gridDim.x * WARPS) {
    const u8* record = p.base + __ldg(p.page_table + row * p.max_pages + page) + (i64)head * RECORD;
    __syncwarp();
    copy_part<RECORD>(part, record, lane);
    __syncwarp();
    const Header header(part + MEAN_OFFSET, lane);
    *(float2*)(scales[warp] + 2 * lane) =
        decode_scales(load_scales(part + K_BYTES + SCALE_OFFSET_V, lane), header.v_base());
    __syncwarp();
    float x[16], most = 1e-30f;
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const int token = page * forge::PAGE + 16 * t + i;
      const float w = query < p.queries && token < length ? __ldg(weights + token) : 0.f;
      mass += w;
      x[i] = w * scales[warp][16 * t + i];
      most = fmaxf(most, fabsf(x[i]));
    }
    most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
    most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
    u32 w[1][2][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      w[0][0][i] = w[0][1][i] = 0;
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int v = __float2int_rn(x[4 * i + k] * (32512.f / most)), low = (int)(signed char)(v & 255);
        w[0][0][i] |= (u32)((v - low) >> 8 & 255) << (8 * k);
        w[0][1][i] |= (u32)(low & 255) << (8 * k);
      }
    }
    const float step = most * (256.f / 32512.f) * p.unit;
    const float s0 = __shfl_sync(~0u, step, 8 * t), s1 = __shfl_sync(~0u, step, 8 * t + 4);
    Sums high;
    const u8* const values[1] = {part + K_BYTES};
    value_sums<true>(values, lane, w, constants, [&](int unit, int set, const Sums& d) {
      if (set == 0) high = d;
#pragma unroll
      for (int k = 0; k < 4; ++k)
        if (set) acc[4 * unit + k] = fmaf(join_terms(high[k], d[k]), k & 1 ? s1 : s0, acc[4 * unit + k]);
    });
  }
  mass += __shfl_xor_sync(~0u, mass, 1);
  mass += __shfl_xor_sync(~0u, mass, 2);
  __syncthreads();
  constexpr int ROW = DIM + 1;  // the last column is the sum of weights
  float* sums = (float*)shared + warp * QUERIES * ROW;
#pragma unroll
  for (int i = 0; i < DIM / 4; ++i) sums[(2 * t + (i & 1)) * ROW + i / 4 * 16 + g + 8 * (i >> 1 & 1)] = acc[i];
  if (t == 0) sums[g * ROW + DIM] = mass;
  __syncthreads();
  for (int i = warp; i < QUERIES && first + i < p.queries; i += WARPS) {
    float x[E], total = 0.f;
#pragma unroll
    for (int k = 0; k < E; ++k) x[k] = 0.f;
    for (int from = 0; from < WARPS; ++from) {
      const float* s = (const float*)shared + (from * QUERIES + i) * ROW;
      total += s[DIM];
#pragma unroll
      for (int k = 0; k < E; ++k) x[k] += s[lane + 32 * k];
    }
    transform_out<DIM, FORGE_ROTATION>(x, p.transform, head, lane);
    const i64 at = (((i64)blockIdx.x * gridDim.z + row) * p.kv_heads + head) * p.queries + first + i;
#pragma unroll
    for (int k = 0; k < E; ++k) {
      const int c = lane + 32 * k;
      if (p.transform.mu) x[k] = fmaf(total, __ldg(p.transform.mu + head * p.transform.mu_stride + c), x[k]);
      if (c < HEAD_DIM) p.out[at * HEAD_DIM + c] = x[k];
    }
  }
}
