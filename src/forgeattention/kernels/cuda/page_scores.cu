// Scores of queries against the mean key of each page. Grid: (splits, kv_heads * query_tiles, rows); a warp takes
// sixteen pages at a time, whose mean rows are the rows of one product.
//
// Macros besides those of page.cuh: FORGE_WARPS, FORGE_ROTATION, FORGE_TYPE (queries).
#include "page.cuh"
#include "transform.cuh"

constexpr int WARPS = FORGE_WARPS, QUERIES = 8, E = DIM / 32;

// Low bits of the four bytes of a word, the first byte's in bit 0.
__device__ __forceinline__ u32 low_bits(u32 x) { return (x & 0x01010101u) * 0x01020408u >> 24 & 15; }

FORGE_KERNEL(32 * WARPS) page_scores(FORGE_PARAMS p) {
  __shared__ __align__(16) u8 terms[QUERIES * QUERY_BYTES];
  __shared__ __align__(16) u32 words[CONSTANT_WORDS];
  __shared__ float steps[QUERIES], shifts[QUERIES];
  __shared__ int totals[2 * QUERIES];
  const int thread = thread_index(), warp = thread >> 5, lane = thread & 31, g = lane >> 2, t = lane & 3;
  const int row = blockIdx.z, head = blockIdx.y / p.query_tiles, first = blockIdx.y % p.query_tiles * QUERIES;
  const int used = (__ldg(p.lengths + row) + forge::PAGE - 1) / forge::PAGE;
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
  Queries q[QUERIES / 4];
#pragma unroll
  for (int b = 0; b < QUERIES / 4; ++b) q[b].load(terms + 4 * b * QUERY_BYTES, totals + 8 * b, lane);
  const Constants constants(words);
  for (int from = (blockIdx.x * WARPS + warp) * 16; from < p.pages; from += gridDim.x * WARPS * 16) {
    const u8* means[2];
    float sizes[2] = {0.f, 0.f};
    if (from < used)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int page = min(from + g + 8 * i, used - 1);
        means[i] = p.base + __ldg(p.page_table + row * p.max_pages + page) + (i64)head * RECORD + MEAN_OFFSET;
        const uint4 header = __ldg((const uint4*)means[i]);
        sizes[i] = half_to_float(low_bits(header.x) | low_bits(header.y) << 4 | low_bits(header.z) << 8 |
                                 low_bits(header.w) << 12);
      }
#pragma unroll
    for (int b = 0; b < QUERIES / 4; ++b) {
      const int query = 4 * b + t;
      float sums[2] = {0.f, 0.f};
      if (from < used) {
        const u8* const rows[2] = {means[0], means[1]};
        mean_sums(rows, lane, q[b], constants, sums);
      }
      if (first + query >= p.queries) continue;
      float* out = p.out + (((i64)row * p.kv_heads + head) * p.queries + first + query) * p.pages;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int page = from + g + 8 * i;
        if (page < p.pages) out[page] = page < used ? fmaf(sums[i] * sizes[i], steps[query], shifts[query]) : NEG_INF;
      }
    }
  }
}
