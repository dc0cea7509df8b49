// Scores of queries against all packed keys, and each page's largest score and sum of exponentials. Grid: (splits,
// kv_heads * blocks, rows); a warp takes every (splits * WARPS)-th page, with a ring of loads of the K parts of records.
//
// Macros besides those of page.cuh: FA_QUERIES (4 or 8 of one KV head), FA_WARPS, FA_STAGES, FA_CTAS, FA_ROTATION, FA_TYPE,
// FA_PARAMS_BYTES.
#include "page.cuh"
#include "transform.cuh"

constexpr int WARPS = FA_WARPS, STAGES = FA_STAGES, QUERIES = FA_QUERIES, E = DIM / 32;
constexpr bool DUP = QUERIES == 4;
constexpr int SPAN = span<DUP>();

struct Params {
  const void* q;       // FA_TYPE [batch, q_heads, n, head_dim]
  const u8* base;      // added to offsets; null if they are addresses
  const i64* offsets;  // [batch, max_pages] bytes
  const int* lengths;  // [batch] tokens
  float* scores;       // [batch, q_heads, n, 64 pages], -inf from the row's length on
  float2* stats;       // [batch, q_heads, n, pages]
  TransformArgs transform;
  i64 q_stride[3];     // elements: row, head, token
  i64 max_pages;
  int kv_heads, group, n, queries, blocks, pages;  // queries = group * n
  float scale, unit;
};
static_assert(sizeof(Params) == FA_PARAMS_BYTES, "the launcher's structure differs");

// Eight neighbouring floats of every lane to 32-byte aligned memory, those of lane t ^ 1 being 16 tokens away. Lanes pair up so
// that each store fills whole sectors.
__device__ __forceinline__ void store_eight(float* at, const float* x, int lane, bool any) {
  const bool odd = lane & 1;
  float4 give;
  give.x = __shfl_xor_sync(~0u, odd ? x[0] : x[4], 1);
  give.y = __shfl_xor_sync(~0u, odd ? x[1] : x[5], 1);
  give.z = __shfl_xor_sync(~0u, odd ? x[2] : x[6], 1);
  give.w = __shfl_xor_sync(~0u, odd ? x[3] : x[7], 1);
  if (!any) return;
  // First the even lane's eight, then the odd one's.
  *(float4*)(odd ? at - 12 : at) = odd ? give : make_float4(x[0], x[1], x[2], x[3]);
  *(float4*)(odd ? at + 4 : at + 16) = odd ? make_float4(x[4], x[5], x[6], x[7]) : give;
}

extern "C" __global__ void __launch_bounds__(32 * WARPS, FA_CTAS) sparse_scores(const __grid_constant__ Params p) {
  extern __shared__ __align__(128) u8 shared[];  // ring [WARPS][STAGES][K_BYTES], barriers
  __shared__ __align__(16) u8 terms[QUERY_BYTES];
  __shared__ __align__(16) u32 words[CONSTANT_WORDS];
  __shared__ float steps[QUERIES], shifts[QUERIES];
  __shared__ __align__(16) float all_scales[WARPS][fa::PAGE];
  const int thread = thread_index(), warp = thread >> 5, lane = thread & 31, g = lane >> 2, t = lane & 3;
  const int row = blockIdx.z, head = blockIdx.y / p.blocks, first = blockIdx.y % p.blocks * QUERIES;
  const int length = __ldg(p.lengths + row), used = (length + fa::PAGE - 1) / fa::PAGE;
  const int begin = blockIdx.x * WARPS + warp, step = gridDim.x * WARPS;
  const i64* offsets = p.offsets + row * p.max_pages;
  const u8* base = p.base + (i64)head * RECORD;
  Ring<STAGES, K_BYTES, 0> ring;
  ring.init(shared + warp * STAGES * K_BYTES, (u64*)(shared + WARPS * STAGES * K_BYTES) + warp * STAGES * 2, lane);
#pragma unroll
  for (int i = 0; i < STAGES; ++i) {
    const int page = begin + i * step;
    ring.fill(i, 0, page < used, base + (page < used ? __ldg(offsets + page) : 0), lane);
    ring.fill(i, 1, false, nullptr, lane);
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
        if (32 * k + lane < HEAD_DIM) x[k] = load_element<FA_TYPE>(p.q, at + 32 * k + lane);
    }
    const float shift = dot_mu<DIM>(x, p.transform, head, lane);
    transform_in<DIM, FA_ROTATION>(x, p.transform, head, lane);
    const float size = split_query(x, terms, i, lane);
    if (lane == 0) {
      steps[i] = size * p.scale;
      shifts[i] = shift * p.scale;
    }
  }
  __syncthreads();
  Queries q[1];
  q[0].template load<DUP>(terms, lane);
  const Constants constants(words);
  const int mine = DUP ? g & 3 : g, query = first + mine;
  const float factor = steps[mine] * p.unit, mean_factor = steps[mine], fixed_shift = shifts[mine];
  float* scales = all_scales[warp];
  const i64 line = ((i64)row * p.kv_heads + head) * p.queries + query;
  float* out = p.scores + line * p.pages * fa::PAGE + first_token<DUP>(lane);
  float2* stats = p.stats + line * p.pages;
  const bool leader = t == 0 && (!DUP || g < 4) && query < p.queries;
  int stage = 0;
  u32 phase = 0;
  for (int page = begin; page < used; page += step) {
    const int next = page + STAGES * step;
    const i64 offset = next < used ? __ldg(offsets + next) : 0;
    const u8* part = shared + (warp * STAGES + stage) * K_BYTES;
    ring.wait(stage, 0, phase);
    const Header header(part + MEAN_OFFSET, lane);
    *(float2*)(scales + 2 * lane) = decode_scales(load_scales(part + SCALE_OFFSET_K, lane), header.k_base());
    const float shift = fmaf(mean_sum(part + MEAN_OFFSET, lane, q[0], constants.start) * header.mean_scale(), mean_factor, fixed_shift);
    float s[1][SPAN];
    key_sums<DUP>(part, lane, q, constants, s);
    __syncwarp();
    ring.fill(stage, 0, next < used, base + offset, lane);
    ring.fill(stage, 1, false, nullptr, lane);
    const int valid = length - page * fa::PAGE - first_token<DUP>(lane);
    float top = NEG_INF, sum = 0.f;
#pragma unroll
    for (int i = 0; i < SPAN; i += 4) {
      const float4 n = *(const float4*)(scales + first_token<DUP>(lane) + i);
      const float n4[4] = {n.x, n.y, n.z, n.w};
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        s[0][i + k] = i + k < valid ? fmaf(s[0][i + k] * n4[k], factor, shift) : NEG_INF;
        top = fmaxf(top, s[0][i + k]);
      }
    }
    top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
    top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
    if (DUP) top = fmaxf(top, __shfl_xor_sync(~0u, top, 16));
    const float low = top * LOG2E;
#pragma unroll
    for (int i = 0; i < SPAN; ++i) sum += ex2(fmaf(s[0][i], LOG2E, -low));
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    if (DUP) sum += __shfl_xor_sync(~0u, sum, 16);
#pragma unroll
    for (int i = 0; i < SPAN; i += 8) store_eight(out + (i64)page * fa::PAGE + i, s[0] + i, lane, query < p.queries);
    if (leader) stats[page] = make_float2(top, sum);
    if (++stage == STAGES) {
      stage = 0;
      phase ^= 1;
    }
  }
  for (int page = used + begin; page < p.pages; page += step) {
    if (query < p.queries)
#pragma unroll
      for (int i = 0; i < SPAN; ++i) out[(i64)page * fa::PAGE + i] = NEG_INF;
    if (leader) stats[page] = make_float2(NEG_INF, 0.f);
  }
}
