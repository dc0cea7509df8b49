// Scores of queries against all packed keys, and each page's largest score and sum of exponentials. Grid: (splits,
// kv_heads * query_tiles, rows); a warp takes every (splits * WARPS)-th page, with a ring of loads of the K parts of
// records.
//
// Macros besides those of page.cuh: FORGE_QUERIES (4 or 8 of one KV head), FORGE_WARPS, FORGE_STAGES, FORGE_CTAS,
// FORGE_ROTATION, FORGE_TYPE.
#include "page.cuh"
#include "transform.cuh"

constexpr int WARPS = FORGE_WARPS, STAGES = FORGE_STAGES, QUERIES = FORGE_QUERIES, E = DIM / 32;
constexpr int BLOCKS = QUERIES / 4;

FORGE_KERNEL(32 * WARPS, FORGE_CTAS) sparse_scores(FORGE_PARAMS p) {
  extern __shared__ __align__(128) u8 shared[];  // ring [WARPS][STAGES][K_BYTES], barriers
  __shared__ __align__(16) u8 terms[QUERIES * QUERY_BYTES];
  __shared__ __align__(16) u32 words[CONSTANT_WORDS];
  __shared__ float steps[QUERIES], shifts[QUERIES];
  __shared__ int totals[2 * QUERIES];
  __shared__ __align__(16) float all_scales[WARPS][forge::PAGE];
  const int thread = thread_index(), warp = thread >> 5, lane = thread & 31, g = lane >> 2, t = lane & 3;
  const int row = blockIdx.z, head = blockIdx.y / p.query_tiles, first = blockIdx.y % p.query_tiles * QUERIES;
  const int length = __ldg(p.lengths + row), used = (length + forge::PAGE - 1) / forge::PAGE;
  const int begin = blockIdx.x * WARPS + warp, step = gridDim.x * WARPS;
  const i64* page_table = p.page_table + row * p.max_pages;
  const u8* base = p.base + (i64)head * RECORD;
  Ring<STAGES, 1, K_BYTES, 0> ring;
  ring.init(shared + warp * STAGES * K_BYTES, (u64*)(shared + FORGE_AT_BARRIERS) + warp * STAGES * 2, lane);
#pragma unroll
  for (int i = 0; i < STAGES; ++i) {
    const int page = begin + i * step;
    const u8* const records[1] = {base + (page < used ? __ldg(page_table + page) : 0)};
    ring.fill(i, 0, page < used, records, lane);
    ring.fill(i, 1, 0, records, lane);
  }
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
    const float size = split_query(x, terms + i * QUERY_BYTES, sums, lane);
    if (lane == 0) {
      totals[2 * i] = sums[0];
      totals[2 * i + 1] = sums[1];
      steps[i] = size * p.scale;
      shifts[i] = shift * p.scale;
    }
  }
  __syncthreads();
  Queries q[BLOCKS];
#pragma unroll
  for (int b = 0; b < BLOCKS; ++b) q[b].load(terms + 4 * b * QUERY_BYTES, totals + 8 * b, lane);
  const Constants constants(words);
  float* scales = all_scales[warp];
  // A lane has query t of each block; it writes eight neighbouring tokens, half of which another lane has computed.
  const i64 line = ((i64)row * p.kv_heads + head) * p.queries + first + t;
  const int run = (lane >> 3) * 16 + (lane >> 2 & 1) * 8;
  int stage = 0;
  u32 phase = 0;
  for (int page = begin; page < used; page += step) {
    const int next = page + STAGES * step;
    const i64 offset = next < used ? __ldg(page_table + next) : 0;
    const u8* part = shared + (warp * STAGES + stage) * K_BYTES;
    ring.wait(stage, 0, phase);
    const u8* const means[1] = {part + MEAN_OFFSET};
    const Header header(means[0], lane);
    *(float2*)(scales + 2 * lane) = decode_scales(load_scales(part + SCALE_OFFSET_K, lane), header.k_base());
    float s[BLOCKS][SPAN], mean[BLOCKS][1];
#pragma unroll
    for (int b = 0; b < BLOCKS; ++b) mean_sums(means, lane, q[b], constants, mean[b]);
    key_sums(part, lane, q, constants, s);
    __syncwarp();
    const u8* const records[1] = {base + offset};
    ring.fill(stage, 0, next < used, records, lane);
    ring.fill(stage, 1, 0, records, lane);
    const int valid = length - page * forge::PAGE;
#pragma unroll
    for (int b = 0; b < BLOCKS; ++b) {
      const int query = 4 * b + t;
      const float factor = steps[query] * p.unit,
                  shift = fmaf(mean[b][0] * header.mean_scale(), steps[query], shifts[query]);
      float top = NEG_INF, sum = 0.f;
#pragma unroll
      for (int i = 0; i < SPAN; ++i) {
        const int token = key_token(lane, i);
        s[b][i] = token < valid ? fmaf(s[b][i] * scales[token], factor, shift) : NEG_INF;
        top = fmaxf(top, s[b][i]);
      }
#pragma unroll
      for (int i = 4; i < 32; i <<= 1) top = fmaxf(top, __shfl_xor_sync(~0u, top, i));
      const float low = top * LOG2E;
#pragma unroll
      for (int i = 0; i < SPAN; ++i) sum += ex2(fmaf(s[b][i], LOG2E, -low));
#pragma unroll
      for (int i = 4; i < 32; i <<= 1) sum += __shfl_xor_sync(~0u, sum, i);
      // Lanes 4 apart hold the even and the odd tokens of a run of 16.
      const bool odd = lane & 4;
      float x[SPAN];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float other = __shfl_xor_sync(~0u, odd ? s[b][i] : s[b][4 + i], 4);
        x[2 * i] = odd ? other : s[b][i];
        x[2 * i + 1] = odd ? s[b][4 + i] : other;
      }
      if (first + query >= p.queries) continue;
      float* out = p.scores + (line + 4 * b) * p.pages * forge::PAGE + (i64)page * forge::PAGE + run;
      *(float4*)out = make_float4(x[0], x[1], x[2], x[3]);
      *(float4*)(out + 4) = make_float4(x[4], x[5], x[6], x[7]);
      if (lane < 4) p.stats[(line + 4 * b) * p.pages + page] = make_float2(top, sum);
    }
    __syncwarp();
    if (++stage == STAGES) {
      stage = 0;
      phase ^= 1;
    }
  }
  for (int page = used + begin; page < p.pages; page += step)
    for (int b = 0; b < BLOCKS; ++b) {
      if (first + 4 * b + t >= p.queries) continue;
      float* out = p.scores + (line + 4 * b) * p.pages * forge::PAGE + (i64)page * forge::PAGE + run;
#pragma unroll
      for (int i = 0; i < SPAN; ++i) out[i] = NEG_INF;
      if (lane < 4) p.stats[(line + 4 * b) * p.pages + page] = make_float2(NEG_INF, 0.f);
    }
}
