// Scaled scores of queries against packed keys. Grid: (page groups, kv_heads * blocks, rows).
#include "scores_args.cuh"

FA_KERNEL(32 * WARPS) qk_scores(FA_PARAMS p) {
  __shared__ __align__(16) u8 parts[WARPS][K_BYTES];
  __shared__ __align__(16) u8 terms[QUERY_BYTES];
  __shared__ __align__(16) u32 words[CONSTANT_WORDS];
  __shared__ float steps[QUERIES], shifts[QUERIES];
  __shared__ float scales[WARPS][fa::PAGE];
  const int thread = thread_index(), warp = thread >> 5, lane = thread & 31, g = lane >> 2, t = lane & 3;
  const int row = blockIdx.z, head = blockIdx.y / p.blocks, first = blockIdx.y % p.blocks * QUERIES;
  const int length = __ldg(p.lengths + row);
  if (thread == 0) Constants::store(words);
  for (int i = warp; i < QUERIES; i += WARPS) {
    const int query = first + i;
    float x[E];
#pragma unroll
    for (int k = 0; k < E; ++k) x[k] = 0.f;
    if (query < p.queries) {
      const i64 at = row * p.q_stride[0] + (head * p.group + query / p.n) * p.q_stride[1] + query % p.n * p.q_stride[2];
#pragma unroll
      for (int k = 0; k < E; ++k)
        if (32 * k + lane < HEAD_DIM) x[k] = load_element<FA_TYPE>(p.q, at + 32 * k + lane);
    }
    const float shift = dot_mu<DIM>(x, p.transform, head, lane);
    transform_in<DIM, FA_ROTATION>(x, p.transform, head, lane);
    const float step = split_query(x, terms, i, lane);
    if (lane == 0) {
      steps[i] = step * p.scale;
      shifts[i] = shift * p.scale;
    }
  }
  __syncthreads();
  Queries q[1];
  q[0].load<false>(terms, lane);
  const Constants constants(words);
  const int query = first + g;
  float* out = p.out + (((i64)row * p.kv_heads + head) * p.queries + query) * p.max_length;
  for (int page = blockIdx.x * WARPS + warp; page * fa::PAGE < p.max_length; page += gridDim.x * WARPS) {
    const int from = page * fa::PAGE;
    float s[1][16], shift = NEG_INF;
    if (from < length) {
      const u8* record = p.base + __ldg(p.offsets + row * p.max_pages + page) + (i64)head * RECORD;
      __syncwarp();
      copy_part<K_BYTES>(parts[warp], record, lane);
      __syncwarp();
      const Header header(parts[warp] + MEAN_OFFSET, lane);
      const float2 two = decode_scales(load_scales(parts[warp] + SCALE_OFFSET_K, lane), header.k_base());
      *(float2*)(scales[warp] + 2 * lane) = two;
      shift = fmaf(mean_sum(parts[warp] + MEAN_OFFSET, lane, q[0], constants.start) * header.mean_scale(), steps[g], shifts[g]);
      key_sums<false>(parts[warp], lane, q, constants, s);
      __syncwarp();
    }
    if (query < p.queries)
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        const int token = from + 16 * t + i;
        if (token < p.max_length) out[token] = token < length ? fmaf(s[0][i] * scales[warp][16 * t + i], steps[g] * p.unit, shift) : NEG_INF;
      }
  }
}
