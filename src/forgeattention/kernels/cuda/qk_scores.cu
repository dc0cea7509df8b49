// Scaled scores of queries against packed keys. Grid: (splits, kv_heads * query_tiles, rows).
#include "scores_args.cuh"

FORGE_KERNEL(32 * WARPS) qk_scores(FORGE_PARAMS p) {
  __shared__ __align__(16) u8 parts[WARPS][K_BYTES];
  __shared__ __align__(16) u8 terms[QUERIES * QUERY_BYTES];
  __shared__ __align__(16) u32 words[CONSTANT_WORDS];
  __shared__ float steps[QUERIES], shifts[QUERIES];
  __shared__ int totals[2 * QUERIES];
  __shared__ float scales[WARPS][forge::PAGE], scores[WARPS][QUERIES][forge::PAGE];
  const int thread = thread_index(), warp = thread >> 5, lane = thread & 31, t = lane & 3;
  const int row = blockIdx.z, head = blockIdx.y / p.query_tiles, first = blockIdx.y % p.query_tiles * QUERIES;
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
        if (32 * k + lane < HEAD_DIM) x[k] = load_element<FORGE_TYPE>(p.q, at + 32 * k + lane);
    }
    const float shift = dot_mu<DIM>(x, p.transform, head, lane);
    transform_in<DIM, FORGE_ROTATION>(x, p.transform, head, lane);
    int sums[2];
    const float step = split_query(x, terms + i * QUERY_BYTES, sums, lane);
    if (lane == 0) {
      totals[2 * i] = sums[0];
      totals[2 * i + 1] = sums[1];
      steps[i] = step * p.scale;
      shifts[i] = shift * p.scale;
    }
  }
  __syncthreads();
  constexpr int BLOCKS = QUERIES / 4;
  Queries q[BLOCKS];
#pragma unroll
  for (int b = 0; b < BLOCKS; ++b) q[b].load(terms + 4 * b * QUERY_BYTES, totals + 8 * b, lane);
  const Constants constants(words);
  for (int page = blockIdx.x * WARPS + warp; page * forge::PAGE < p.max_length; page += gridDim.x * WARPS) {
    const int from = page * forge::PAGE;
    if (from < length) {
      const u8* record = p.base + __ldg(p.page_table + row * p.max_pages + page) + (i64)head * RECORD;
      __syncwarp();
      copy_part<K_BYTES>(parts[warp], record, lane);
      __syncwarp();
      const u8* const means[1] = {parts[warp] + MEAN_OFFSET};
      const Header header(means[0], lane);
      *(float2*)(scales[warp] + 2 * lane) =
          decode_scales(load_scales(parts[warp] + SCALE_OFFSET_K, lane), header.k_base());
      __syncwarp();
      float s[BLOCKS][SPAN];
      key_sums(parts[warp], lane, q, constants, s);
#pragma unroll
      for (int b = 0; b < BLOCKS; ++b) {
        float mean[1];
        mean_sums(means, lane, q[b], constants, mean);
        const int query = 4 * b + t;
        const float shift = fmaf(mean[0] * header.mean_scale(), steps[query], shifts[query]);
#pragma unroll
        for (int i = 0; i < SPAN; ++i) {
          const int token = key_token(lane, i);
          scores[warp][query][token] = fmaf(s[b][i] * scales[warp][token], steps[query] * p.unit, shift);
        }
      }
      __syncwarp();
    }
    for (int i = 0; i < QUERIES && first + i < p.queries; ++i)
#pragma unroll
      for (int k = 0; k < forge::PAGE; k += 32) {
        const int token = from + k + lane;
        if (token < p.max_length)
          p.out[(((i64)row * p.kv_heads + head) * p.queries + first + i) * p.max_length + token] =
              token < length ? scores[warp][i][k + lane] : NEG_INF;
      }
  }
}
