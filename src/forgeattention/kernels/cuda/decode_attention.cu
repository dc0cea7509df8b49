// Decode attention: the newest queries of every row over its pages and its exact tokens, in one launch.
//
// A row's work for one KV head is cut into chunks by the row's own lengths alone, so its result does not depend on the
// batch. CTAs take chunks in turn; a warp takes every FA_WARPS-th page of a chunk and keeps its ring of loads running from one
// chunk into the next. The last CTA to finish a row's head merges its chunks, applies the values' inverse transform and
// joins the exact tokens.
#include "decode_args.cuh"
#include "exact.cuh"

// Reads an item's queries, keeps them as they are for the exact tokens and splits the transformed ones. One query a warp.
__device__ __forceinline__ void load_queries(const Params& p, const Item& it, const Shared& sh, int warp, int lane) {
  for (int i = warp; i < (DUP ? 4 : QUERIES); i += WARPS) {
    const int query = it.block * QUERIES + i;
    float x[E];
#pragma unroll
    for (int k = 0; k < E; ++k) x[k] = 0.f;
    if (query < p.queries) {
      const i64 at = it.row * p.q_stride[0] + (it.head * p.group + query / p.n) * p.q_stride[1] + query % p.n * p.q_stride[2];
#pragma unroll
      for (int k = 0; k < E; ++k)
        if (32 * k + lane < HEAD_DIM) x[k] = load_element<FA_TYPE>(p.q, at + 32 * k + lane);
    }
#pragma unroll
    for (int k = 0; k < E; ++k)
      if (32 * k + lane < HEAD_DIM) sh.plain()[i * HEAD_DIM + 32 * k + lane] = x[k];
    const float shift = dot_mu<DIM>(x, p.k_transform, it.head, lane);
    transform_in<DIM, FA_ROTATION>(x, p.k_transform, it.head, lane);
    const float step = split_query(x, sh.terms + i / 8 * QUERY_BYTES, i & 7, lane);
    if (lane == 0) {
      sh.step[i] = step;
      sh.shift[i] = shift;
    }
  }
}

// A warp's running attention over pages. Query g of block b has maximum m[b] (log2 units) and the lane's share l[b] of the sum;
// the accumulators hold unit u of block b at 4 (u BLOCKS + b), as `unit_sums` gives them.
struct State {
  float m[BLOCKS], l[BLOCKS], acc[BLOCKS * DIM / 4];
};

constexpr int SPAN = span<DUP>();
// Maximum over the lanes that share a query.
__device__ __forceinline__ float row_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 2));
  return DUP ? fmaxf(x, __shfl_xor_sync(~0u, x, 16)) : x;
}
// Lane that holds query `column` of a fragment, 0..7; with DUP columns 4..7 carry the low bytes of queries 0..3.
__device__ __forceinline__ int column_lane(int column) { return (DUP ? column & 3 : column) * 4; }

__device__ __forceinline__ void value_step(const u8* codes, const float* scales, int lane, const Constants& constants, float (&s)[BLOCKS][SPAN],
                                           const float (&qs)[BLOCKS], const float (&top)[BLOCKS], const float (&shift)[BLOCKS], State& st) {
  const int t = lane & 3;
  u32 w[DUP ? 1 : 2 * BLOCKS][4];
  float w0[BLOCKS], w1[BLOCKS];
#pragma unroll
  for (int b = 0; b < BLOCKS; ++b) {
    const float here = top[b] + shift[b];
    if (__any_sync(~0u, here > st.m[b] + 8.f)) {  // the running maximum need not be tight
      const float now = fmaxf(st.m[b], here), keep = ex2(st.m[b] - now);
      st.l[b] *= keep;
      st.m[b] = now;
      const float k0 = __shfl_sync(~0u, keep, column_lane(2 * t)), k1 = __shfl_sync(~0u, keep, column_lane(2 * t + 1));
#pragma unroll
      for (int u = 0; u < UNITS; ++u)
#pragma unroll
        for (int k = 0; k < 4; ++k) st.acc[4 * (u * BLOCKS + b) + k] *= k & 1 ? k1 : k0;
    }
    // Weights times value scales as 16 bits of the page's largest such product.
    float sum = 0.f, most = 1e-30f;
#pragma unroll
    for (int i = 0; i < SPAN; i += 4) {
      const float4 n = *(const float4*)(scales + first_token<DUP>(lane) + i);
      const float n4[4] = {n.x, n.y, n.z, n.w};
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const float e = ex2(fmaf(s[b][i + k], qs[b], -top[b]));
        sum += e;
        s[b][i + k] = e * n4[k];
        most = fmaxf(most, s[b][i + k]);
      }
    }
    most = row_max(most);
    const float back = ex2(here - st.m[b]);
    st.l[b] = fmaf(sum, back, st.l[b]);
    const float step = back * most * (1.f / WEIGHT_MAX), fixed = __fdividef(WEIGHT_MAX, most);
    w0[b] = __shfl_sync(~0u, step, column_lane(2 * t));
    w1[b] = __shfl_sync(~0u, step, column_lane(2 * t + 1));
    u32 high[SPAN / 4], low[SPAN / 4];
#pragma unroll
    for (int i = 0; i < SPAN / 4; ++i) {
      u32 f[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) f[k] = __float_as_uint(fmaf(s[b][4 * i + k], fixed, 8388608.f));
      high[i] = prmt(prmt(f[0], f[1], 0x0051u), prmt(f[2], f[3], 0x0051u), 0x5410);
      low[i] = prmt(prmt(f[0], f[1], 0x0040u), prmt(f[2], f[3], 0x0040u), 0x5410);
    }
    if constexpr (DUP) {  // columns 0..3 are high bytes, 4..7 low bytes, each of all 16 tokens
      const bool upper = lane >= 16;
      if (t >= 2) {
        w0[b] *= 1.f / 256.f;
        w1[b] *= 1.f / 256.f;
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const u32 mine = upper ? low[i] : high[i], other = __shfl_xor_sync(~0u, upper ? high[i] : low[i], 16);
        w[0][i] = upper ? other : mine;
        w[0][2 + i] = upper ? mine : other;
      }
    } else {
#pragma unroll
      for (int i = 0; i < SPAN / 4; ++i) {
        w[2 * b][i] = high[i];
        w[2 * b + 1][i] = low[i];
      }
    }
  }
  // High and low bytes: sets of the same columns, or (DUP) columns 0..3 and 4..7 of one set.
  float x_high[4];
  value_sums(codes, lane, w, constants, [&](int unit, int set, const float(&x)[4]) {
    const int b = DUP ? 0 : set / 2;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      float& a = st.acc[4 * (unit * BLOCKS + b) + k];
      if constexpr (DUP) {
        a = fmaf(x[k], k & 1 ? w1[b] : w0[b], a);
      } else if (set & 1) {
        a = fmaf(fmaf(x[k], 1.f / 256.f, x_high[k]), k & 1 ? w1[b] : w0[b], a);
      } else {
        x_high[k] = x[k];
      }
    }
  });
}

// Merges the warps' states into warp 0's and writes it to the item's slot.
__device__ __forceinline__ void merge_warps(const Params& p, State& st, const Shared& sh, i64 slot, int warp, int lane) {
  const int g = lane >> 2, t = lane & 3;
  float kept[KEPT];
#pragma unroll
  for (int b = 0; b < BLOCKS; ++b) {
    st.l[b] += __shfl_xor_sync(~0u, st.l[b], 1);
    st.l[b] += __shfl_xor_sync(~0u, st.l[b], 2);
    if (DUP) st.l[b] += __shfl_xor_sync(~0u, st.l[b], 16);
  }
#pragma unroll
  for (int i = 0; i < KEPT; ++i) {
    if constexpr (DUP) {  // high and low parts lie two lanes apart; each keeps half of the channels
      const float mine = t < 2 ? st.acc[i] : st.acc[i + KEPT], other = t < 2 ? st.acc[i + KEPT] : st.acc[i];
      kept[i] = mine + __shfl_xor_sync(~0u, other, 2);
    } else {
      kept[i] = st.acc[i];
    }
  }
  float* buffer = (float*)sh.scratch;
  float* ml = buffer + MERGE_WARPS * KEPT * 32;
  __syncthreads();
  for (int n = WARPS; n > 1;) {
    const int m = min(MERGE_WARPS, n / 2);
    if (warp >= n - m && warp < n) {
      const int to = warp - (n - m);
#pragma unroll
      for (int i = 0; i < KEPT; ++i) buffer[(to * KEPT + i) * 32 + lane] = kept[i];
#pragma unroll
      for (int b = 0; b < BLOCKS; ++b) {
        ml[((to * BLOCKS + b) * 2) * 32 + lane] = st.m[b];
        ml[((to * BLOCKS + b) * 2 + 1) * 32 + lane] = st.l[b];
      }
    }
    __syncthreads();
    if (warp >= n - 2 * m && warp < n - m) {
      const int from = warp - (n - 2 * m);
      float a[BLOCKS][2], c[BLOCKS][2];
#pragma unroll
      for (int b = 0; b < BLOCKS; ++b) {
        const float m2 = ml[((from * BLOCKS + b) * 2) * 32 + lane], l2 = ml[((from * BLOCKS + b) * 2 + 1) * 32 + lane];
        const float now = fmaxf(st.m[b], m2), mine = ex2(st.m[b] - now), other = ex2(m2 - now);
        st.l[b] = st.l[b] * mine + l2 * other;
        st.m[b] = now;
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          a[b][k] = __shfl_sync(~0u, mine, column_lane(2 * t + k));
          c[b][k] = __shfl_sync(~0u, other, column_lane(2 * t + k));
        }
      }
#pragma unroll
      for (int i = 0; i < KEPT; ++i) {
        const int b = DUP ? 0 : i / 4 % BLOCKS;
        kept[i] = kept[i] * a[b][i & 1] + buffer[(from * KEPT + i) * 32 + lane] * c[b][i & 1];
      }
    }
    __syncthreads();
    n -= m;
  }
  if (warp == 0) {
    const float unit = 256.f * p.v_unit;
#pragma unroll
    for (int i = 0; i < KEPT; ++i) {
      const int b = DUP ? 0 : i / 4 % BLOCKS, u = i / 4 / BLOCKS + (DUP && t >= 2 ? UNITS / 2 : 0);
      const int query = b * 8 + (DUP ? 2 * (t & 1) : 2 * t) + (i & 1);
      p.part[(slot * QUERIES + query) * DIM + 16 * u + g + 8 * (i >> 1 & 1)] = kept[i] * unit;
    }
#pragma unroll
    for (int b = 0; b < BLOCKS; ++b)
      if (t == 0 && (!DUP || g < 4)) p.part_ml[slot * QUERIES + b * 8 + g] = make_float2(st.m[b], st.l[b]);
  }
}

// Joins a head's chunks and exact tokens: PARTS warps share a query's chunks.
__device__ __forceinline__ void finish(const Params& p, const Item& it, const Shared& sh, i64 slot, int warp, int lane) {
  constexpr int PARTS = WARPS >= 2 * QUERIES ? WARPS / QUERIES : 1;
  const int part = warp % PARTS, limit = min(QUERIES, p.queries - it.block * QUERIES);
  const i64 exact_slot = slot + p.slots - WARPS;
  float* sums = (float*)sh.scratch;                               // [WARPS][DIM]
  float* factors = sums + WARPS * DIM + warp * (p.slots + WARPS);  // of chunks, then of the exact tokens' warps
  for (int i = warp / PARTS; i < (PARTS > 1 ? QUERIES : limit); i += WARPS / PARTS) {
    const int query = it.block * QUERIES + i, q_head = it.head * p.group + query / p.n;
    float y[E], packed = 0.f, recent = 0.f, top = NO_MAX, sink = 0.f;
#pragma unroll
    for (int k = 0; k < E; ++k) y[k] = 0.f;
    if (i < limit) {
      for (int c = lane; c < it.chunks; c += 32) {
        const float2 ml = __ldcg(p.part_ml + (slot + c) * QUERIES + i);
        if (ml.y > 0.f) top = fmaxf(top, ml.x);
      }
      float2 mine = make_float2(NO_MAX, 0.f);
      if (it.exact > 0 && lane < WARPS) mine = __ldcg(p.part_ml + (exact_slot + lane) * QUERIES + i);
      if (mine.y > 0.f) top = fmaxf(top, mine.x);
      top = warp_max(top);
      if (p.sink_logits) {
        sink = __ldg(p.sink_logits + q_head) * LOG2E;
        top = fmaxf(top, sink);
        sink = ex2(sink - top);
      }
      for (int c = lane; c < it.chunks; c += 32) {
        const float2 ml = __ldcg(p.part_ml + (slot + c) * QUERIES + i);
        const float f = ml.y > 0.f ? ex2(ml.x - top) : 0.f;
        packed = fmaf(ml.y, f, packed);
        factors[c] = f;
      }
      recent = mine.y > 0.f ? ex2(mine.x - top) : 0.f;
      if (lane < WARPS) factors[it.chunks + lane] = recent;
      packed = warp_sum(packed);
      recent = warp_sum(recent * mine.y);
      __syncwarp();
      const float* from = p.part + (slot * QUERIES + i) * DIM + lane;
#pragma unroll 4
      for (int c = part; c < it.chunks; c += PARTS) {
        const float f = factors[c];
#pragma unroll
        for (int k = 0; k < E; ++k) {
          const float x = f > 0.f ? __ldcg(from + (i64)c * QUERIES * DIM + 32 * k) : 0.f;
          y[k] = fmaf(f, x, y[k]);
        }
      }
    }
    if constexpr (PARTS > 1) {
#pragma unroll
      for (int k = 0; k < E; ++k) sums[warp * DIM + lane + 32 * k] = y[k];
      __syncthreads();
      if (part) continue;
      for (int w = 1; w < PARTS; ++w)
#pragma unroll
        for (int k = 0; k < E; ++k) y[k] += sums[(warp + w) * DIM + lane + 32 * k];
    }
    if (i >= limit) continue;
    transform_out<DIM, FA_ROTATION>(y, p.v_transform, it.head, lane);
    if (p.v_transform.mu)
#pragma unroll
      for (int k = 0; k < E; ++k) y[k] = fmaf(packed, __ldg(p.v_transform.mu + it.head * p.v_transform.mu_stride + lane + 32 * k), y[k]);
    if (it.exact > 0)
#pragma unroll
      for (int w = 0; w < WARPS; ++w) {
        const float f = factors[it.chunks + w];
        const float* from = p.part + ((exact_slot + w) * QUERIES + i) * DIM + lane;
#pragma unroll
        for (int k = 0; k < E; ++k)
          if (32 * k + lane < HEAD_DIM) y[k] = fmaf(f, f > 0.f ? __ldcg(from + 32 * k) : 0.f, y[k]);
      }
    const float total = packed + recent + sink, inverse = total > 0.f ? 1.f / total : 0.f;
    const i64 at = ((i64)it.row * p.kv_heads + it.head) * p.queries + query;
#pragma unroll
    for (int k = 0; k < E; ++k)
      if (32 * k + lane < HEAD_DIM) store_element<FA_TYPE>(p.out, at * HEAD_DIM + 32 * k + lane, y[k] * inverse);
    if (lane == 0) p.lse[at] = total > 0.f ? (top + lg2(total)) * LN2 : NEG_INF;
  }
}

// Pages of an item that a warp takes.
__device__ __forceinline__ int pages_of(const Item& it, int warp) { return max(0, (it.end - it.begin - warp + WARPS - 1) / WARPS); }

// The pages that a warp loads in order: those of the item at work, then those of the next one.
struct Pages {
  const i64* offsets;  // of the item's pages, WARPS apart
  int count;
  i64 offset;          // of the page last looked up, in flight
  int head;            // of that page, or -1 for none

  __device__ __forceinline__ Pages(const Params& p, const Item& it, int warp)
      : offsets(p.offsets + it.row * p.max_pages + it.begin + warp), count(pages_of(it, warp)) {}
  // Begins to look up the j-th page. Nothing waits for the offset before `record`.
  __device__ __forceinline__ void look_up(const Params& p, const Item& it, const Item& next, int warp, int j) {
    const i64* at = offsets + j * WARPS;
    head = it.head;
    if (j >= count) {
      j -= count;
      head = j < pages_of(next, warp) ? next.head : -1;
      at = p.offsets + next.row * p.max_pages + next.begin + warp + j * WARPS;
    }
    if (head >= 0) asm volatile("ld.global.nc.b64 %0, [%1];" : "=l"(offset) : "l"(at));
  }
  __device__ __forceinline__ const u8* record(const Params& p) const { return p.base + offset + (i64)head * RECORD; }
};

FA_KERNEL(32 * WARPS, FA_CTAS) decode_attention(FA_PARAMS p) {
  extern __shared__ __align__(128) u8 shared[];
  const Shared sh(shared);
  const int thread = thread_index(), warp = thread >> 5, lane = thread & 31, g = lane >> 2, t = lane & 3;
  Ring<STAGES, K_BYTES, V_BYTES> ring;
  ring.init(sh.ring + warp * STAGES * RECORD, sh.barriers + warp * STAGES * 2, lane);
  if (thread == 0) Constants::store(sh.constants);
  if (warp < 2) {
    Item first;
    first.find(p, blockIdx.x + warp * gridDim.x, lane);
    if (lane == 0) sh.items[warp] = first;
  }
  float* scales = sh.scales(warp);
  int stage = 0, filled = 0;
  u32 phase = 0;
  for (int number = blockIdx.x, at = 0;; number += gridDim.x, at = at < 2 ? at + 1 : 0) {
    __syncthreads();
    const Item &it = sh.items[at], &following = sh.items[at < 2 ? at + 1 : 0];
    if (it.chunks == 0) break;
    Pages pages(p, it, warp);
    {
      i64 offsets[STAGES];
      int heads[STAGES];
      const int known = min(filled, pages.count);
#pragma unroll
      for (int j = 0; j < STAGES; ++j) {  // what the item before could not see yet
        heads[j] = -1;
        if (j < known) continue;
        pages.look_up(p, it, following, warp, j);
        offsets[j] = pages.offset;
        heads[j] = pages.head;
      }
#pragma unroll
      for (int j = 0; j < STAGES; ++j) {
        const int to = stage + j < STAGES ? stage + j : stage + j - STAGES;
        const u8* record = p.base + offsets[j] + (i64)heads[j] * RECORD;
        if (j < known) continue;
        ring.fill(to, 0, heads[j] >= 0, record, lane);
        ring.fill(to, 1, heads[j] >= 0, record, lane);
      }
    }
    filled = STAGES;
    load_queries(p, it, sh, warp, lane);
    __syncthreads();
    if (warp == WARPS - 1 && following.chunks) {  // over the item that is done, for two turns on
      Item after;
      after.find(p, number + 2 * gridDim.x, lane);
      if (lane == 0) sh.items[at > 0 ? at - 1 : 2] = after;
    }
    const i64 slot = (((i64)it.row * p.kv_heads + it.head) * p.blocks + it.block) * p.slots;
    if (it.chunk == 0 && it.exact > 0) exact::attend(p, it, sh, slot + p.slots - WARPS, warp, lane);
    if (it.begin < it.end) {
      Queries q[BLOCKS];
      float qs[BLOCKS], fixed_shift[BLOCKS];  // log2 units of a key sum; of every score
      State st;
#pragma unroll
      for (int b = 0; b < BLOCKS; ++b) {
        q[b].template load<DUP>(sh.terms + b * QUERY_BYTES, lane);
        const int query = 8 * b + (DUP ? g & 3 : g);
        qs[b] = sh.step[query] * p.scale_log2;
        fixed_shift[b] = sh.shift[query] * p.scale_log2;
        st.m[b] = NO_MAX;
        st.l[b] = 0.f;
      }
#pragma unroll
      for (int i = 0; i < BLOCKS * DIM / 4; ++i) st.acc[i] = 0.f;
      const Constants constants(sh.constants);
      int valid = it.length - (it.begin + warp) * fa::PAGE;  // tokens from the page's first one on
      pages.look_up(p, it, following, warp, STAGES);
      for (int j = 0; j < pages.count; ++j, valid -= WARPS * fa::PAGE) {
        const u8* record = sh.ring + (warp * STAGES + stage) * RECORD;
        float s[BLOCKS][SPAN], top[BLOCKS], shift[BLOCKS], unit[BLOCKS];
        ring.wait(stage, 0, phase);
        const Header header(record + MEAN_OFFSET, lane);
        const float2 key_scales = decode_scales(load_scales(record + SCALE_OFFSET_K, lane), header.k_base());
#pragma unroll
        for (int b = 0; b < BLOCKS; ++b) {
          shift[b] = fmaf(mean_sum(record + MEAN_OFFSET, lane, q[b], constants.start) * header.mean_scale(), qs[b], fixed_shift[b]);
          unit[b] = qs[b] * p.k_unit;
        }
        key_sums<DUP>(record, lane, q, constants, s);
        *(float2*)(scales + 2 * lane) = key_scales;
        __syncwarp();
        ring.fill(stage, 0, pages.head >= 0, pages.record(p), lane);
#pragma unroll
        for (int b = 0; b < BLOCKS; ++b)
#pragma unroll
          for (int i = 0; i < SPAN; i += 4) {
            const float4 n = *(const float4*)(scales + first_token<DUP>(lane) + i);
            s[b][i] *= n.x, s[b][i + 1] *= n.y, s[b][i + 2] *= n.z, s[b][i + 3] *= n.w;
          }
        if (valid < fa::PAGE)
#pragma unroll
          for (int b = 0; b < BLOCKS; ++b)
#pragma unroll
            for (int i = 0; i < SPAN; ++i)
              if (first_token<DUP>(lane) + i >= valid) s[b][i] = NEG_INF;
#pragma unroll
        for (int b = 0; b < BLOCKS; ++b) {
          top[b] = s[b][0];
#pragma unroll
          for (int i = 1; i < SPAN; ++i) top[b] = fmaxf(top[b], s[b][i]);
          top[b] = row_max(top[b]) * unit[b];
        }
        ring.wait(stage, 1, phase);
        *(float2*)(scales + 64 + 2 * lane) = decode_scales(load_scales(record + K_BYTES + SCALE_OFFSET_V, lane), header.v_base());
        __syncwarp();
        value_step(record + K_BYTES, scales + 64, lane, constants, s, unit, top, shift, st);
        __syncwarp();
        ring.fill(stage, 1, pages.head >= 0, pages.record(p), lane);
        pages.look_up(p, it, following, warp, j + 1 + STAGES);
        if (++stage == STAGES) {
          stage = 0;
          phase ^= 1;
        }
      }
      merge_warps(p, st, sh, slot + it.chunk, warp, lane);
    } else if (thread < QUERIES) {
      p.part_ml[(slot + it.chunk) * QUERIES + thread] = make_float2(NO_MAX, 0.f);
    }
    __threadfence();
    __syncthreads();
    bool last = false;
    if (thread == 0) {
      u32* counter = p.counter + ((i64)it.row * p.kv_heads + it.head) * p.blocks + it.block;
      last = atomicInc(counter, it.chunks - 1) == it.chunks - 1;
    }
    if (__syncthreads_or(last)) {
      __threadfence();
      finish(p, it, sh, slot, warp, lane);
    }
  }
}
