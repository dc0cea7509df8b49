// Scores of queries against the mean key of each page. Grid: (splits, kv_heads * blocks, rows); a warp takes eight pages at a time,
// whose mean rows are the columns of one product.
//
// Macros besides those of page.cuh: FA_WARPS, FA_ROTATION, FA_TYPE (queries), FA_PARAMS_BYTES.
#include "page.cuh"
#include "transform.cuh"

constexpr int WARPS = FA_WARPS, QUERIES = 8, E = DIM / 32;

struct Params {
  const void* q;       // FA_TYPE [batch, q_heads, n, head_dim]
  const u8* base;      // added to offsets; null if they are addresses
  const i64* offsets;  // [batch, max_pages] bytes
  const int* lengths;  // [batch] tokens
  float* out;          // [batch, q_heads, n, pages]
  TransformArgs transform;
  i64 q_stride[3];     // elements: row, head, token
  i64 max_pages;
  int kv_heads, group, n, queries, blocks, pages;  // queries = group * n
  float scale;
};
static_assert(sizeof(Params) == FA_PARAMS_BYTES, "the launcher's structure differs");

// Low bits of the four bytes of a word, the first byte's in bit 0.
__device__ __forceinline__ u32 low_bits(u32 x) { return (x & 0x01010101u) * 0x01020408u >> 24 & 15; }

extern "C" __global__ void __launch_bounds__(32 * WARPS) page_scores(const __grid_constant__ Params p) {
  __shared__ __align__(16) u8 terms[QUERY_BYTES];
  __shared__ __align__(16) u32 words[CONSTANT_WORDS];
  __shared__ float steps[QUERIES], shifts[QUERIES];
  const int thread = thread_index(), warp = thread >> 5, lane = thread & 31, g = lane >> 2, t = lane & 3;
  const int row = blockIdx.z, head = blockIdx.y / p.blocks, first = blockIdx.y % p.blocks * QUERIES;
  const int used = (__ldg(p.lengths + row) + fa::PAGE - 1) / fa::PAGE;
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
  Queries q;
  q.load<false>(terms, lane);
  const Constants constants(words);
  const int query = first + g;
  float* out = p.out + (((i64)row * p.kv_heads + head) * p.queries + query) * p.pages;
  for (int from = (blockIdx.x * WARPS + warp) * 8; from < p.pages; from += gridDim.x * WARPS * 8) {
    const int page = from + g;
    const u8* mean = p.base + __ldg(p.offsets + row * p.max_pages + min(page, max(used - 1, 0))) + (i64)head * RECORD + MEAN_OFFSET;
    float total[2] = {0.f, 0.f}, size = 0.f;
    if (from < used) {
      const uint4 header = __ldg((const uint4*)mean);
      size = half_to_float(low_bits(header.x) | low_bits(header.y) << 4 | low_bits(header.z) << 8 | low_bits(header.w) << 12);
      Sums sums;
#pragma unroll
      for (int step = 0; step < STEPS; ++step) {
        const uint2 b = __ldg((const uint2*)(mean + t * (DIM / 4) + 8 * step));
        const uint4 a = q.get(step);
        const u32 a4[4] = {a.x, a.y, a.z, a.w};
        mma_ss(sums, a4, b.x, b.y, step % CHAIN ? sums : constants.start);
        if (step % CHAIN == CHAIN - 1 || step == STEPS - 1)
#pragma unroll
          for (int k = 0; k < 2; ++k) total[k] += fmaf(sums[2 + k], 1.f / 256.f, sums[k] - (MAGIC + MAGIC / 256.f));
      }
    }
#pragma unroll
    for (int k = 0; k < 2; ++k) {  // of pages 2 t and 2 t + 1
      const int at = from + 2 * t + k;
      const float step = __shfl_sync(~0u, size, 4 * (2 * t + k));
      if (query < p.queries && at < p.pages) out[at] = at < used ? fmaf(total[k] * step, steps[g], shifts[g]) : NEG_INF;
    }
  }
}
