// The pages of each KV head to which its queries are estimated to give the largest shares (see sparse/pages.py). Grid:
// one CTA for each row and KV head.
//
// A page's rank is the largest, over the queries of the KV head, of the score of its mean less the log-sum-exp of all
// means. The `budget` pages of largest rank are taken, the earlier of equal ones first, and listed in their order.
#include "block.cuh"

__device__ __forceinline__ u32 ordered(float x) {
  const u32 bits = __float_as_uint(x + 0.f);  // -0 is 0
  return bits ^ ((u32)((int)bits >> 31) | 0x80000000u);
}

FORGE_KERNEL(THREADS) page_select(FORGE_PARAMS p) {
  extern __shared__ __align__(16) u8 memory[];
  u32* ranks = (u32*)memory;  // [pages], ordered
  __shared__ u64 sums[WARPS];
  __shared__ u32 bins[256];
  __shared__ int found, remaining;
  const int thread = threadIdx.x, row = blockIdx.x / p.kv_heads, head = blockIdx.x % p.kv_heads;
  const int used = (__ldg(p.lengths + row) + forge::PAGE - 1) / forge::PAGE, budget = min(p.budget, used);
  const float* means = p.means + (i64)blockIdx.x * p.queries * p.pages;
  for (int query = 0; query < p.queries; ++query) {
    const float* line = means + (i64)query * p.pages;
    float top = NO_MAX, sum = 0.f;
#pragma unroll 4
    for (int i = thread; i < used; i += THREADS) {
      const float x = line[i], now = fmaxf(top, x);
      sum = fmaf(sum, ex2((top - now) * LOG2E), ex2((x - now) * LOG2E));
      top = now;
    }
    const float most = block_max(top, sums), total = block_sum(sum * ex2((top - most) * LOG2E), sums);
    const float lse = most + lg2(total) * LN2;
#pragma unroll 4
    for (int i = thread; i < used; i += THREADS) {
      const u32 rank = ordered(line[i] - lse);
      ranks[i] = query ? max(ranks[i], rank) : rank;
    }
  }
  // The rank of the last page taken, a byte at a time, and how many of that rank are taken.
  u32 prefix = 0;
  int wanted = budget;
  for (int shift = 24; shift >= 0 && budget > 0; shift -= 8) {
    if (thread < 256) bins[thread] = 0;
    __syncthreads();
    for (int i = thread; i < used; i += THREADS) {
      const u32 rank = ranks[i];
      if (shift == 24 || rank >> (shift + 8) == prefix) atomicAdd(&bins[255 - (rank >> shift & 255)], 1u);
    }
    __syncthreads();
    const int mine = thread < 256 ? (int)bins[thread] : 0, upto = block_scan(mine, sums);
    if (thread < 256 && upto >= wanted && upto - mine < wanted) {
      found = 255 - thread;
      remaining = wanted - (upto - mine);
    }
    __syncthreads();
    prefix = prefix << 8 | (u32)found;
    wanted = remaining;
    __syncthreads();
  }
  // Each thread lists a run of neighbouring pages: first how many come before it, above that rank and of it.
  const int run = (used + THREADS - 1) / THREADS, begin = min(thread * run, used), end = min(begin + run, used);
  u32 above = 0, equal = 0;
  for (int i = begin; i < end; ++i) {
    above += ranks[i] > prefix;
    equal += ranks[i] == prefix;
  }
  const u64 before = block_scan((u64)above << 32 | equal, sums) - ((u64)above << 32 | equal);
  u32 over = (u32)(before >> 32), ties = (u32)before;
  const i64* page_table = p.page_table + row * p.max_pages;
  i64* chosen = p.chosen + (i64)blockIdx.x * p.budget;
  u8* read = p.read + (i64)blockIdx.x * p.pages;
  for (int i = begin; i < end; ++i) {
    const bool higher = ranks[i] > prefix, tie = ranks[i] == prefix && budget > 0;
    const bool taken = (higher && budget > 0) || (tie && ties < (u32)wanted);
    if (taken) chosen[over + min(ties, (u32)wanted)] = __ldg(page_table + i) + (i64)head * p.record;
    read[i] = taken;
    over += higher;
    ties += tie;
  }
  for (int i = used + thread; i < p.pages; i += THREADS) read[i] = 0;
  if (thread == 0) p.tokens[blockIdx.x] = budget * forge::PAGE;
}
