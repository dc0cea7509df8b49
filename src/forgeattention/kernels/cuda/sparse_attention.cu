// Softmax over the tokens that reach their query's threshold, joined with attention over other tokens. Grid: (splits,
// kv_heads * query_tiles, rows); a warp takes every (splits * WARPS)-th page and leaves those without a survivor
// unread. The last CTA of a head adds the splits. Splits do not depend on lengths, so that a row's result ignores the
// batch.
//
// Macros besides those of page.cuh: FORGE_WARPS, FORGE_STAGES, FORGE_CTAS, FORGE_ROTATION, FORGE_TYPE (output and the
// other tokens' output).
#include "page.cuh"
#include "transform.cuh"

constexpr int WARPS = FORGE_WARPS, STAGES = FORGE_STAGES, QUERIES = 8, E = DIM / 32;
constexpr int TAIL = RECORD - MEAN_OFFSET;  // of a record: the mean row, which holds the header, and the values
constexpr int LINE = DIM + 1;               // sums of a query and, last, of its weights
constexpr float WEIGHT_MAX = 65500.f;

FORGE_KERNEL(32 * WARPS, FORGE_CTAS) sparse_attention(FORGE_PARAMS p) {
  extern __shared__ __align__(128)
      u8 shared[];  // ring [WARPS][STAGES][TAIL], barriers; then sums [WARPS][QUERIES][LINE]
  __shared__ __align__(16) u32 words[CONSTANT_WORDS];
  __shared__ __align__(16) float all_scales[WARPS][forge::PAGE];
  __shared__ float limits[QUERIES];
  const int thread = thread_index(), warp = thread >> 5, lane = thread & 31, g = lane >> 2, t = lane & 3;
  const int row = blockIdx.z, head = blockIdx.y / p.query_tiles, block = blockIdx.y % p.query_tiles,
            first = block * QUERIES;
  const int length = __ldg(p.lengths + row), used = (length + forge::PAGE - 1) / forge::PAGE;
  const int count = min(QUERIES, p.queries - first);
  const i64 line = ((i64)row * p.kv_heads + head) * p.queries + first;  // of the block's first query
  const i64* page_table = p.page_table + row * p.max_pages;
  const u8* base = p.base + (i64)head * RECORD + MEAN_OFFSET;
  Ring<STAGES, 1, TAIL, 0> ring;
  ring.init(shared + warp * STAGES * TAIL, (u64*)(shared + FORGE_AT_BARRIERS) + warp * STAGES * 2, lane);
  if (thread == 0) Constants::store(words);
  if (thread < QUERIES)
    limits[thread] = thread < count ? __ldg(p.threshold + line + thread) : __int_as_float(0x7f800000);
  __syncthreads();
  const Constants constants(words);
  const bool mine = g < count;
  const float limit = limits[g], top = mine ? __ldg(p.top + line + g) * LOG2E : 0.f;
  const int last = mine ? __ldg(p.last + line + g) : -1;
  const float* scores = p.scores + (line + g) * p.pages * forge::PAGE + 16 * t;
  float* scales = all_scales[warp];
  float acc[DIM / 4], mass = 0.f;
#pragma unroll
  for (int i = 0; i < DIM / 4; ++i) acc[i] = 0.f;
  int stage = 0;
  u32 phase = 0;
  const int step = gridDim.x * WARPS;
  for (int from = blockIdx.x * WARPS + warp; from < used; from += 32 * step) {
    const int tested = from + lane * step;
    bool any = false;
    if (tested < used)
#pragma unroll
      for (int i = 0; i < QUERIES; ++i)
        if (i < count) any |= __ldg(&p.stats[(line + i) * p.pages + tested].x) >= limits[i];
    const u32 mask = __ballot_sync(~0u, any);
    u32 coming = mask;  // pages whose values are still to be asked for
    int fill = stage;
    const auto ask = [&] {
      const int page = coming ? from + (__ffs(coming) - 1) * step : -1;
      coming &= coming - 1;
      const u8* const records[1] = {base + (page >= 0 ? __ldg(page_table + page) : 0)};
      ring.fill(fill, 0, page >= 0, records, lane);
      ring.fill(fill, 1, 0, records, lane);
      fill = fill + 1 == STAGES ? 0 : fill + 1;
    };
#pragma unroll
    for (int i = 0; i < STAGES; ++i) ask();
    float4 next[4];
    const auto read = [&](u32 left) {
      if (!left) return;
      const int page = from + (__ffs(left) - 1) * step;
#pragma unroll
      for (int i = 0; i < 4; ++i)
        next[i] = mine ? __ldg((const float4*)(scores + (i64)page * forge::PAGE) + i) : make_float4(0.f, 0.f, 0.f, 0.f);
    };
    read(mask);
    for (u32 left = mask; left; left &= left - 1) {
      const int page = from + (__ffs(left) - 1) * step;
      float x[16], most = 1e-30f;
#pragma unroll
      for (int i = 0; i < 4; ++i)
        x[4 * i] = next[i].x, x[4 * i + 1] = next[i].y, x[4 * i + 2] = next[i].z, x[4 * i + 3] = next[i].w;
      read(left & (left - 1));
      const u8* part = shared + (warp * STAGES + stage) * TAIL;
      ring.wait(stage, 0, phase);
      const Header header(part, lane);
      *(float2*)(scales + 2 * lane) = decode_scales(load_scales(part + DIM + SCALE_OFFSET_V, lane), header.v_base());
      __syncwarp();
      const int token = page * forge::PAGE + 16 * t;
#pragma unroll
      for (int i = 0; i < 16; i += 4) {
        const float4 n = *(const float4*)(scales + 16 * t + i);
        const float n4[4] = {n.x, n.y, n.z, n.w};
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const float s = x[i + k];
          const bool kept = mine && token + i + k < length && (s > limit || (s == limit && token + i + k <= last));
          const float w = kept ? ex2(fmaf(s, LOG2E, -top)) : 0.f;
          mass += w;
          x[i + k] = kept ? w * n4[k] : 0.f;  // scales past the row's length may be anything
          most = fmaxf(most, x[i + k]);
        }
      }
      most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
      most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
      const float fixed = __fdividef(WEIGHT_MAX, most), one = most * (1.f / WEIGHT_MAX);
      const float w0 = __shfl_sync(~0u, one, 8 * t), w1 = __shfl_sync(~0u, one, 8 * t + 4);
      u32 w[1][2][4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        u32 f[4];
#pragma unroll
        for (int k = 0; k < 4; ++k) f[k] = __float_as_uint(fmaf(x[4 * i + k], fixed, 8388608.f));
        w[0][0][i] = prmt(prmt(f[0], f[1], 0x0051u), prmt(f[2], f[3], 0x0051u), 0x5410);
        w[0][1][i] = prmt(prmt(f[0], f[1], 0x0040u), prmt(f[2], f[3], 0x0040u), 0x5410);
      }
      Sums high;
      const u8* const values[1] = {part + DIM};
      value_sums(values, lane, w, constants, [&](int unit, int set, const Sums& d) {
        if (set == 0) high = d;
#pragma unroll
        for (int k = 0; k < 4; ++k)
          if (set) acc[4 * unit + k] = fmaf(join_terms(high[k], d[k]), k & 1 ? w1 : w0, acc[4 * unit + k]);
      });
      __syncwarp();
      fill = stage;
      ask();
      if (++stage == STAGES) {
        stage = 0;
        phase ^= 1;
      }
    }
  }
  mass += __shfl_xor_sync(~0u, mass, 1);
  mass += __shfl_xor_sync(~0u, mass, 2);
  __syncthreads();
  float* sums = (float*)shared + warp * QUERIES * LINE;
#pragma unroll
  for (int i = 0; i < DIM / 4; ++i)
    sums[(2 * t + (i & 1)) * LINE + i / 4 * 16 + g + 8 * (i >> 1 & 1)] = acc[i] * (256.f * p.unit);
  if (t == 0) sums[g * LINE + DIM] = mass;
  __syncthreads();
  const int splits = gridDim.x;
  const i64 partial = (i64)(row * gridDim.y + blockIdx.y) * splits;
  float* part = p.part + (partial + blockIdx.x) * QUERIES * LINE;
  for (int i = thread; i < QUERIES * LINE; i += 32 * WARPS) {
    float sum = 0.f;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) sum += ((const float*)shared)[w * QUERIES * LINE + i];
    part[i] = sum;
  }
  __threadfence();
  __syncthreads();
  bool final = false;
  if (thread == 0) final = atomicInc(p.counter + row * gridDim.y + blockIdx.y, splits - 1) == (u32)splits - 1;
  if (!__syncthreads_or(final)) return;
  __threadfence();
  for (int i = warp; i < count; i += WARPS) {
    const float* from = p.part + (partial * QUERIES + i) * LINE;
    float y[E], total = 0.f;
#pragma unroll
    for (int k = 0; k < E; ++k) y[k] = 0.f;
#pragma unroll 4
    for (int s = 0; s < splits; ++s) {
      total += __ldcg(from + (i64)s * QUERIES * LINE + DIM);
#pragma unroll
      for (int k = 0; k < E; ++k) y[k] += __ldcg(from + (i64)s * QUERIES * LINE + lane + 32 * k);
    }
    transform_out<DIM, FORGE_ROTATION>(y, p.transform, head, lane);
    const i64 at = line + i;
    const float packed = __ldg(p.top + at), other = p.other ? __ldg(p.other_lse + at) : NEG_INF;
    const float most = fmaxf(total > 0.f ? packed : NEG_INF, other), safe = most > NEG_INF ? most : 0.f;
    const float a = total > 0.f ? ex2((packed - safe) * LOG2E) : 0.f, b = p.other ? ex2((other - safe) * LOG2E) : 0.f;
    const float whole = fmaf(a, total, b);
    const bool bad = limits[i] != limits[i];
    const float share = bad ? limits[i] : whole > 0.f ? 1.f / whole : 0.f;
#pragma unroll
    for (int k = 0; k < E; ++k) {
      const int c = lane + 32 * k;
      if (p.transform.mu) y[k] = fmaf(total, __ldg(p.transform.mu + head * p.transform.mu_stride + c), y[k]);
      if (c >= HEAD_DIM) continue;
      const float x = p.other ? load_element<FORGE_TYPE>(p.other, at * HEAD_DIM + c) : 0.f;
      store_element<FORGE_TYPE>(p.out, at * HEAD_DIM + c, fmaf(a, y[k], b * x) * share);
    }
    if (lane == 0) p.lse[at] = bad ? limits[i] : whole > 0.f ? safe + lg2(whole) * LN2 : NEG_INF;
  }
}
