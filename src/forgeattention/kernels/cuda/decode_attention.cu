// Decode attention: the newest queries of every row over its pages and its exact tokens, in one launch.
//
// Grid: (num_splits, kv_heads * query_tiles, rows). A CTA takes one split of a row's pages for one KV head, a warp
// every WARPS-th stage of pages in it. CTAs end early, so several share a multiprocessor and one loads while another
// merges. The last CTA of a head to finish joins the splits, applies the values' inverse transform and adds the exact
// tokens.
#include "decode_args.cuh"
#include "exact.cuh"

// A query of the CTA, across the warp: element lane + 32 k.
__device__ __forceinline__ void load_query(const Params& p, const Item& it, int i, int lane, float (&x)[E]) {
  const int query = it.query_tile * QUERIES + i;
  const i64 at =
      it.row * p.q_stride[0] + (it.head * p.group + query / p.n) * p.q_stride[1] + query % p.n * p.q_stride[2];
#pragma unroll
  for (int k = 0; k < E; ++k) {
    x[k] = 0.f;
    if (query < p.queries && 32 * k + lane < HEAD_DIM) x[k] = load_early<FORGE_TYPE>(p.q, at + 32 * k + lane);
  }
}
// Keeps it as it is for the exact tokens and splits the transformed one.
__device__ __forceinline__ void store_query(const Params& p, const Item& it, const Shared& sh, int i, int lane,
                                            float (&x)[E], const Signs<DIM, FORGE_ROTATION>& signs) {
  const float size = exact::store_query(x, sh.plain, i, lane), shift = dot_mu<DIM>(x, p.k_transform, it.head, lane);
  transform_in<DIM, FORGE_ROTATION>(x, p.k_transform, signs, it.head, lane);
  int totals[2];
  const float step = split_query(x, sh.terms + i * QUERY_BYTES, totals, lane);
  if (lane == 0) {
    sh.step[i] = step;
    sh.shift[i] = shift;
    sh.size[i] = size;
    sh.totals[2 * i] = totals[0];
    sh.totals[2 * i + 1] = totals[1];
  }
}

// A warp's running attention over pages, of query 4 b + t: m[b] in log2 units is near its maximum, l[b] the lane's
// share of the sum. acc[2 (u BLOCKS + b) + h] is channel 16 u + 8 h + g.
struct State {
  float m[BLOCKS], l[BLOCKS], acc[BLOCKS * DIM / 8];
};

// Over the lanes that share a query.
__device__ __forceinline__ float column_max(float x) {
#pragma unroll
  for (int i = 4; i < 32; i <<= 1) x = fmaxf(x, __shfl_xor_sync(~0u, x, i));
  return x;
}
__device__ __forceinline__ float column_sum(float x) {
#pragma unroll
  for (int i = 4; i < 32; i <<= 1) x += __shfl_xor_sync(~0u, x, i);
  return x;
}

// Scales of a page's tokens as `key_token` deals them: a lane finds its eight side by side.
__device__ __forceinline__ void store_scales(float* scales, float2 two, int lane) {
  float* at = scales + (lane >> 3) * 16 + (lane & 7);
  at[0] = two.x;
  at[8] = two.y;
}
__device__ __forceinline__ void load_scales_of(const float* scales, int lane, float (&n)[SPAN]) {
#pragma unroll
  for (int i = 0; i < SPAN; i += 4) {
    const float4 v = *(const float4*)(scales + (lane >> 2) * SPAN + i);
    n[i] = v.x, n[i + 1] = v.y, n[i + 2] = v.z, n[i + 3] = v.w;
  }
}

// Scores s in units of `unit`, `shift` added per page -> weights as fragments, and the factor `step` of 256 times their
// sums.
__device__ __forceinline__ void weigh(const float* scales, int lane, int b, float (&s)[STAGE_PAGES][SPAN], float unit,
                                      const float (&shift)[STAGE_PAGES], State& st, u32 (&w)[STAGE_PAGES][BLOCKS][4],
                                      float& step) {
  float top = NO_MAX;
#pragma unroll
  for (int page = 0; page < STAGE_PAGES; ++page) {
    float most = s[page][0];
#pragma unroll
    for (int i = 1; i < SPAN; ++i) most = fmaxf(most, s[page][i]);
    top = fmaxf(top, fmaf(most, unit, shift[page]));
  }
  if (__any_sync(~0u, top > st.m[b] + 8.f)) {  // m need not be tight
    const float now = fmaxf(st.m[b], column_max(top)), rescale = ex2(st.m[b] - now);
    st.l[b] *= rescale;
    st.m[b] = now;
#pragma unroll
    for (int u = 0; u < UNITS; ++u)
#pragma unroll
      for (int h = 0; h < 2; ++h) st.acc[2 * (u * BLOCKS + b) + h] *= rescale;
  }
  // Weights times value scales as 16 bits of the largest such product.
  float sum = 0.f, most = 1e-30f;
#pragma unroll
  for (int page = 0; page < STAGE_PAGES; ++page) {
    float n[SPAN];
    load_scales_of(scales + page * forge::PAGE, lane, n);
    const float from = shift[page] - st.m[b];
#pragma unroll
    for (int i = 0; i < SPAN; ++i) {
      const float e = ex2(fmaf(s[page][i], unit, from));
      sum += e;
      s[page][i] = e * n[i];
      most = fmaxf(most, s[page][i]);
    }
  }
  st.l[b] += sum;
  most = column_max(most);
  step = most * (1.f / WEIGHT_MAX);
  const float fixed = __fdividef(WEIGHT_MAX, most);
#pragma unroll
  for (int page = 0; page < STAGE_PAGES; ++page)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const u32 x = __float_as_uint(fmaf(s[page][2 * i], fixed, 8388608.f)),
                y = __float_as_uint(fmaf(s[page][2 * i + 1], fixed, 8388608.f));
      w[page][b][i] = weight_fragment(prmt(x, y, 0x4051));
    }
}

// A CTA's states to the split's partial, by way of the ring: [WARPS][QUERIES][DIM + 8], in each warp's part of it, and
// maxima and sums.
constexpr int MERGE_ROW = DIM + 8;
static_assert(QUERIES * (MERGE_ROW * 4 + 8) <= STAGES * STAGE_PAGES * RECORD,
              "a warp's part of the ring holds its state");
static_assert(2 * DIM * 4 <= STAGES * STAGE_PAGES * RECORD, "and the sums of `finish`");
__device__ __forceinline__ void merge(const Params& p, State& st, const Shared& sh, i64 partial, int thread) {
  const int warp = thread >> 5, lane = thread & 31, g = lane >> 2, t = lane & 3;
  const auto rows = [&](int w) { return (float*)(sh.ring + w * STAGES * STAGE_PAGES * RECORD); };
  const auto sums = [&](int w) { return (float2*)(rows(w) + QUERIES * MERGE_ROW); };
#pragma unroll
  for (int b = 0; b < BLOCKS; ++b) {
    st.l[b] = column_sum(st.l[b]);
    if (g == 0) sums(warp)[4 * b + t] = make_float2(st.m[b], st.l[b]);
#pragma unroll
    for (int u = 0; u < UNITS; ++u)
#pragma unroll
      for (int h = 0; h < 2; ++h)
        rows(warp)[(4 * b + t) * MERGE_ROW + 16 * u + 8 * h + g] = st.acc[2 * (u * BLOCKS + b) + h];
  }
  __syncthreads();
  for (int i = thread; i < QUERIES * DIM / 2; i += 32 * WARPS) {
    const int query = i / (DIM / 2), channel = i % (DIM / 2) * 2;
    float2 ml[WARPS];
    float top = NO_MAX;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) {
      ml[w] = sums(w)[query];
      top = fmaxf(top, ml[w].x);
    }
    float total = 0.f, x = 0.f, y = 0.f;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) {
      const float f = ex2(ml[w].x - top);
      const float2 v = *(const float2*)(rows(w) + query * MERGE_ROW + channel);
      total = fmaf(ml[w].y, f, total);
      x = fmaf(v.x, f, x);
      y = fmaf(v.y, f, y);
    }
    const float unit = 256.f * p.v_unit;
    *(float2*)(p.part + (partial * QUERIES + query) * DIM + channel) = make_float2(x * unit, y * unit);
    if (channel == 0) p.part_ml[partial * QUERIES + query] = make_float2(top, total);
  }
}

// E floats side by side that other CTAs wrote.
__device__ __forceinline__ void load_floats(const float* from, float (&x)[E]) {
#pragma unroll
  for (int k = 0; k < E; k += E % 4 == 0 ? 4 : E % 2 == 0 ? 2 : 1) {
    if constexpr (E % 4 == 0) {
      const float4 v = __ldcg((const float4*)(from + k));
      x[k] = v.x, x[k + 1] = v.y, x[k + 2] = v.z, x[k + 3] = v.w;
    } else if constexpr (E % 2 == 0) {
      const float2 v = __ldcg((const float2*)(from + k));
      x[k] = v.x, x[k + 1] = v.y;
    } else {
      x[k] = __ldcg(from + k);
    }
  }
}

// Joins a head's splits and exact tokens. PARTS warps share a query's partials, and each loads AHEAD of its own before
// it needs one.
__device__ __forceinline__ void finish(const Params& p, const Item& it, const Cut& cut, const Shared& sh, i64 partial,
                                       int warp, int lane) {
  constexpr int PARTS = WARPS % QUERIES == 0 ? WARPS / QUERIES : 1;
  constexpr int AHEAD_OF_FEW = PARTS > 2 ? 32 / PARTS : 16, AHEAD = E > 4 ? 64 / E : AHEAD_OF_FEW;
  static_assert(AHEAD * PARTS <= 32, "a lane holds one factor");
  const int part = warp % PARTS, partials = cut.splits + cut.tasks;
  const Signs<DIM, FORGE_ROTATION> signs(p.v_transform, it.head, lane);
  for (int i = warp / PARTS; i < QUERIES; i += WARPS / PARTS) {
    const int query = it.query_tile * QUERIES + i, q_head = it.head * p.group + query / p.n;
    if (PARTS == 1 && query >= p.queries) break;
    const float* rows = p.part + (partial * QUERIES + i) * DIM + lane * E;  // lane E + k is the lane's channel k here
    const float2* sums = p.part_ml + partial * QUERIES + i;
    float v[AHEAD][E];
    float2 ml;  // of partial first + lane, of those that the warps hold now
    const auto load = [&](int first) {
#pragma unroll
      for (int a = 0; a < AHEAD; ++a) {
        const int r = first + a * PARTS + part;
#pragma unroll
        for (int k = 0; k < E; ++k) v[a][k] = 0.f;
        if (r < partials) load_floats(rows + (i64)r * QUERIES * DIM, v[a]);
      }
      ml = make_float2(NO_MAX, 0.f);
      if (lane < AHEAD * PARTS && first + lane < partials) ml = __ldcg(sums + (i64)(first + lane) * QUERIES);
    };
    load(0);
    float top = NO_MAX, sink = 0.f;
#pragma unroll 1
    for (int r = lane; r < partials; r += 32) {
      const float2 x = __ldcg(sums + (i64)r * QUERIES);
      if (x.y > 0.f) top = fmaxf(top, x.x);
    }
    top = warp_max(top);
    if (p.sink_logits && query < p.queries) {
      sink = __ldg(p.sink_logits + q_head) * LOG2E;
      top = fmaxf(top, sink);
      sink = ex2(sink - top);
    }
    float packed = 0.f, recent = 0.f, y[E], exact[E];
#pragma unroll
    for (int k = 0; k < E; ++k) y[k] = exact[k] = 0.f;
#pragma unroll 1
    for (int first = 0;;) {
      const float factor = ml.y > 0.f ? ex2(ml.x - top) : 0.f;
      (first + lane < cut.splits ? packed : recent) += ml.y * factor;
#pragma unroll
      for (int a = 0; a < AHEAD; ++a) {
        const float f = __shfl_sync(~0u, factor, a * PARTS + part);
        const bool pages = first + a * PARTS + part < cut.splits;
#pragma unroll
        for (int k = 0; k < E; ++k) {  // exact tokens have no padded channels: what is there must not reach y
          if (pages) {
            y[k] = fmaf(f, v[a][k], y[k]);
          } else {
            exact[k] = fmaf(f, v[a][k], exact[k]);
          }
        }
      }
      first += AHEAD * PARTS;
      if (first >= partials) break;
      load(first);
    }
    packed = warp_sum(packed);
    recent = warp_sum(recent);
    // To element lane + 32 k, by way of each warp's part of the ring.
    float* mine = (float*)(sh.ring + warp * STAGES * STAGE_PAGES * RECORD);
#pragma unroll
    for (int k = 0; k < E; ++k) {
      mine[lane * E + k] = y[k];
      mine[DIM + lane * E + k] = exact[k];
    }
    if (PARTS > 1) {
      __syncthreads();
      if (part || query >= p.queries) break;
    } else {
      __syncwarp();
    }
#pragma unroll
    for (int k = 0; k < E; ++k) y[k] = exact[k] = 0.f;
#pragma unroll
    for (int w = 0; w < PARTS; ++w) {
      const float* from = (const float*)(sh.ring + (warp + w) * STAGES * STAGE_PAGES * RECORD) + lane;
#pragma unroll
      for (int k = 0; k < E; ++k) {
        y[k] += from[32 * k];
        exact[k] += from[DIM + 32 * k];
      }
    }
    __syncwarp();
    transform_out<DIM, FORGE_ROTATION>(y, p.v_transform, signs, it.head, lane);
    const float total = packed + recent + sink, inverse = total > 0.f ? 1.f / total : 0.f;
    const i64 at = ((i64)it.row * p.kv_heads + it.head) * p.queries + query;
    const i64 to = it.row * p.out_stride[0] + q_head * p.out_stride[1] + query % p.n * p.out_stride[2];
#pragma unroll
    for (int k = 0; k < E; ++k) {
      const int channel = 32 * k + lane;
      if (channel >= HEAD_DIM) break;
      if (p.v_transform.mu)
        y[k] = fmaf(packed, __ldg(p.v_transform.mu + it.head * p.v_transform.mu_stride + channel), y[k]);
      store_element<FORGE_TYPE>(p.out, to + channel, (y[k] + exact[k]) * inverse);
    }
    if (lane == 0) p.lse[at] = total > 0.f ? (top + lg2(total)) * LN2 : NEG_INF;
  }
}

FORGE_KERNEL(32 * WARPS, FORGE_CTAS) decode_attention(FORGE_PARAMS p) {
  extern __shared__ __align__(128) u8 shared[];
  const Shared sh(shared);
  const int thread = thread_index(), warp = thread >> 5, lane = thread & 31, t = lane & 3;
  Item it;
  it.row = blockIdx.z, it.head = blockIdx.y / p.query_tiles, it.query_tile = blockIdx.y % p.query_tiles,
  it.split = blockIdx.x;
  // What a CTA needs before its first scores is asked for before its pages, or it would wait behind them: its queries
  // and, supposing that the row is as long as the longest may be, where its first pages are.
  constexpr int OF_WARP = QUERIES > WARPS / 2 ? QUERIES / (WARPS / 2) : 1, QUERY_WARPS = QUERIES / OF_WARP;
  float x[OF_WARP][E];
  if (warp < QUERY_WARPS)
#pragma unroll
    for (int i = 0; i < OF_WARP; ++i) load_query(p, it, warp * OF_WARP + i, lane, x[i]);
  const Signs<DIM, FORGE_ROTATION> signs(p.k_transform, it.head, lane);
  const int *lengths = p.lengths, *exact_lengths = p.exact_lengths;
  it.length = lengths ? load_early(lengths + it.row) : 0;
  it.exact = exact_lengths ? load_early(exact_lengths + it.row) : 0;
  const i64* page_table = p.page_table + it.row * p.max_pages;
  constexpr int STRIDE = WARPS * STAGE_PAGES;
  i64 found[STAGES][STAGE_PAGES];
  const auto find = [&](const Cut& cut) {
    const int page = cut.begin(it.split) + warp * STAGE_PAGES, end = cut.begin(it.split + 1);
#pragma unroll
    for (int i = 0; i < STAGES; ++i)
#pragma unroll
      for (int j = 0; j < STAGE_PAGES; ++j)
        if (page + i * STRIDE + j < end) found[i][j] = load_early(page_table + page + i * STRIDE + j);
  };
  const Cut longest(p, p.max_length, 0);
  constexpr bool GUESS = FORGE_EXACT_BLOCK == 0;  // a paged engine's graph is launched for longer rows than there are
  if constexpr (GUESS) find(longest);
  Ring<STAGES, STAGE_PAGES, K_BYTES, V_BYTES> ring;
  ring.init(sh.ring + warp * STAGES * STAGE_PAGES * RECORD, sh.barriers + warp * STAGES * 2, lane);
  const Cut cut(p, it.length, it.exact);
  if (it.split >= cut.splits) return;
  if (!GUESS || cut.pages != longest.pages) find(cut);
  // Tasks of exact tokens, to the last warps first: they have the fewest pages.
  int task = it.split + (WARPS - 1 - warp) * cut.splits;
  exact::Task tokens;
  tokens.begin(p, it, task, lane);
  const int end = cut.begin(it.split + 1);
  int first = cut.begin(it.split) + warp * STAGE_PAGES;  // page of the stage at work
  const u8* records = p.base + (i64)it.head * RECORD;
  const auto fill_first = [&]() {
#pragma unroll
    for (int i = 0; i < STAGES; ++i) {
      const u8* at[STAGE_PAGES];
#pragma unroll
      for (int j = 0; j < STAGE_PAGES; ++j) at[j] = records + found[i][j];
      ring.fill(i, 0, end - first - i * STRIDE, at, lane);
      ring.fill(i, 1, end - first - i * STRIDE, at, lane);
    }
  };
  // Warps with a query to prepare ask for their pages when it is done: the copies' queue may be full.
  if (warp >= QUERY_WARPS) fill_first();
  if (thread == 0) Constants::store(sh.constants);
  if (warp < QUERY_WARPS)
#pragma unroll
    for (int i = 0; i < OF_WARP; ++i) store_query(p, it, sh, warp * OF_WARP + i, lane, x[i], signs);
  __syncthreads();
  if (warp < QUERY_WARPS) fill_first();
  const i64 partial = (((i64)it.row * p.kv_heads + it.head) * p.query_tiles + it.query_tile) * p.partials;
  while (task < cut.tasks) {
    tokens.attend(p, it, sh, partial + cut.splits + task, lane);
    task += WARPS * cut.splits;
    tokens.begin(p, it, task, lane);
  }
  State st;
  float qs[BLOCKS], fixed_shift[BLOCKS];  // log2 units of a key sum; of every score
  Queries q[BLOCKS];
#pragma unroll
  for (int b = 0; b < BLOCKS; ++b) {
    q[b].load(sh.terms + 4 * b * QUERY_BYTES, sh.totals + 8 * b, lane);
    qs[b] = sh.step[4 * b + t] * p.scale_log2;
    fixed_shift[b] = sh.shift[4 * b + t] * p.scale_log2;
    st.m[b] = NO_MAX;
    st.l[b] = 0.f;
  }
#pragma unroll
  for (int i = 0; i < BLOCKS * DIM / 8; ++i) st.acc[i] = 0.f;
  const Constants constants(sh.constants);
  float* scales = sh.scales + warp * STAGE_PAGES * forge::PAGE;
  int stage = 0;
  u32 phase = 0;
  for (; first < end; first += STRIDE) {
    const u8* here[STAGE_PAGES];
#pragma unroll
    for (int i = 0; i < STAGE_PAGES; ++i) here[i] = sh.ring + ((warp * STAGES + stage) * STAGE_PAGES + i) * RECORD;
    const int ahead = first + STAGES * STRIDE;
    const u8* next[STAGE_PAGES];
#pragma unroll
    for (int i = 0; i < STAGE_PAGES; ++i)
      if (ahead + i < end) next[i] = records + __ldg(page_table + ahead + i);
    float s[BLOCKS][STAGE_PAGES][SPAN], shift[BLOCKS][STAGE_PAGES], v_base[STAGE_PAGES];
    ring.wait(stage, 0, phase);
    float mean_scale[STAGE_PAGES];
    const u8* means[STAGE_PAGES];
    // Tokens from the first page's first one on; where there is no second page its place holds anything.
    const int valid = min(it.length, end * forge::PAGE) - first * forge::PAGE;
#pragma unroll
    for (int i = 0; i < STAGE_PAGES; ++i) {
      means[i] = here[i] + MEAN_OFFSET;
      const Header header(means[i], lane);
      mean_scale[i] = i == 0 || valid > i * forge::PAGE ? header.mean_scale() : 0.f;
      v_base[i] = header.v_base();
      store_scales(scales + i * forge::PAGE,
                   decode_scales(load_scales(here[i] + SCALE_OFFSET_K, lane), header.k_base()), lane);
    }
#pragma unroll
    for (int b = 0; b < BLOCKS; ++b) {
      mean_sums(means, lane, q[b], constants, shift[b]);
#pragma unroll
      for (int i = 0; i < STAGE_PAGES; ++i) shift[b][i] = fmaf(shift[b][i] * mean_scale[i], qs[b], fixed_shift[b]);
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < STAGE_PAGES; ++i) {
      float sums[BLOCKS][SPAN], n[SPAN];
      key_sums(here[i], lane, q, constants, sums);
      load_scales_of(scales + i * forge::PAGE, lane, n);
#pragma unroll
      for (int b = 0; b < BLOCKS; ++b)
#pragma unroll
        for (int j = 0; j < SPAN; ++j) s[b][i][j] = sums[b][j] * n[j];
    }
    __syncwarp();
    ring.fill(stage, 0, end - ahead, next, lane);
    const int beyond = valid - key_token(lane, 0);
    if (valid < STAGE_PAGES * forge::PAGE) {
      __syncwarp();  // keeps this a branch
#pragma unroll
      for (int b = 0; b < BLOCKS; ++b)
#pragma unroll
        for (int i = 0; i < STAGE_PAGES; ++i)
#pragma unroll
          for (int j = 0; j < SPAN; ++j)
            if (i * forge::PAGE + key_token(0, j) >= beyond) s[b][i][j] = NEG_INF;
    }
    ring.wait(stage, 1, phase);
#pragma unroll
    for (int i = 0; i < STAGE_PAGES; ++i) {
      float2 two = make_float2(0.f, 0.f);
      if (i == 0 || valid > i * forge::PAGE)
        two = decode_scales(load_scales(here[i] + K_BYTES + SCALE_OFFSET_V, lane), v_base[i]);
      store_scales(scales + i * forge::PAGE, two, lane);
    }
    __syncwarp();
    u32 w[STAGE_PAGES][BLOCKS][4];
    float step[BLOCKS];
#pragma unroll
    for (int b = 0; b < BLOCKS; ++b) weigh(scales, lane, b, s[b], qs[b] * p.k_unit, shift[b], st, w, step[b]);
    const u8* values[STAGE_PAGES];
#pragma unroll
    for (int i = 0; i < STAGE_PAGES; ++i) values[i] = here[i] + K_BYTES;
    value_sums(values, lane, w, constants, [&](int unit, int b, const Sums& d) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float& a = st.acc[2 * (unit * BLOCKS + b) + h];
        a = fmaf(join_terms(d[2 * h], d[2 * h + 1]), step[b], a);
      }
    });
    __syncwarp();
    ring.fill(stage, 1, end - ahead, next, lane);
    if (++stage == STAGES) {
      stage = 0;
      phase ^= 1;
    }
  }
  merge(p, st, sh, partial + it.split, thread);
  __syncthreads();
  if (thread == 0) {
    u32* counter = p.counter + ((i64)it.row * p.kv_heads + it.head) * p.query_tiles + it.query_tile;
    u32 before;
    asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;"
                 : "=r"(before)
                 : "l"(counter), "r"(cut.splits - 1)
                 : "memory");
    *sh.last = before == cut.splits - 1;
  }
  __syncthreads();
  if (*sh.last) finish(p, it, cut, sh, partial, warp, lane);
}
