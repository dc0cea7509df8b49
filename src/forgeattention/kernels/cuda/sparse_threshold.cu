// The exact threshold of one query (see ops/sparse.py): the K-th largest score, or the smallest of the fewest scores
// that carry a share of the softmax mass. Grid: one CTA per query.
//
// Tokens are ordered by score and, where equal, by position, as one 64-bit number, so that there are no ties. The
// pages' maxima give a bound under which no kept token can lie, in bins of 1/16 nat below the largest score. A
// histogram of the tokens above it finds the bin in which the last kept token lies; bins are refined until their tokens
// fit a short list, which is searched by counting. Tokens above the bound are kept in shared memory if they fit; else
// every pass reads their pages again.
//
// Macros: FORGE_CAPACITY, FORGE_SHORT, FORGE_LISTED_PAGES, FORGE_SHARED_BYTES.
#include "block.cuh"

constexpr int BINS = THREADS, CAPACITY = FORGE_CAPACITY, SHORT = FORGE_SHORT, LISTED_PAGES = FORGE_LISTED_PAGES;
constexpr float BIN = 16.f;
// Masses are fixed point in units of exp(top) / 2^32, so that sums do not depend on their order.
constexpr float FIXED = 4294967296.f;

__device__ __forceinline__ u64 token_value(float score, int position) {
  const u32 bits = __float_as_uint(score + 0.f);  // -0 is 0
  return (u64)(bits ^ ((u32)((int)bits >> 31) | 0x80000000u)) << 32 | ~(u32)position;
}
__device__ __forceinline__ float score_of(u64 value) {
  const u32 key = (u32)(value >> 32);
  return __uint_as_float(key & 0x80000000u ? key ^ 0x80000000u : ~key);
}
__device__ __forceinline__ int position_of(u64 value) { return (int)~(u32)value; }
// Falls as the score rises.
__device__ __forceinline__ int bin_of(float score, float top) {
  return (int)fminf((top - score) * BIN, (float)(BINS - 1));
}
__device__ __forceinline__ u64 fixed_mass(float score, float top) { return (u64)(ex2((score - top) * LOG2E) * FIXED); }

struct Shared {
  u64 tokens[CAPACITY];  // those above the bound, if they are so few
  u64 list[SHORT];       // those of the last bin
  u32 pages[LISTED_PAGES];
  u32 low[BINS], high[BINS];  // numbers or masses
  u32 counts[BINS];           // numbers of pages where low and high are masses
  u64 sums[WARPS];
  u64 remaining;
  u32 listed, counted, page_count;
  int found;

  // 64-bit atomics on shared memory are loops; two of 32 bits with a carry are not.
  __device__ __forceinline__ void add(int bin, u64 x) {
    const u32 part = (u32)x, before = atomicAdd(&low[bin], part), carry = before + part < before;
    const u32 rest = (u32)(x >> 32) + carry;
    if (rest) atomicAdd(&high[bin], rest);
  }
  __device__ __forceinline__ u64 bin(int i) const { return (u64)high[i] << 32 | low[i]; }
};

static_assert(sizeof(Shared) == FORGE_SHARED_BYTES, "the launcher asks for another size");

// The tokens above the bound.
struct Tokens {
  Shared& sh;
  const float* scores;
  const float2* stats;
  int used, length, limit;  // bins up to `limit`
  float top;

  // Calls use(there, value) by whole warps for all tokens of the pages that reach the bound, by all threads together.
  template <class Use>
  __device__ __forceinline__ void read(Use use) const {
    constexpr int MANY = 8;  // pages whose loads are in flight at once
    const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5;
    for (int from = 0; from < used; from += LISTED_PAGES) {
      __syncthreads();
      if (thread == 0) sh.page_count = 0;
      __syncthreads();
#pragma unroll
      for (int i = 0; i < LISTED_PAGES / THREADS; ++i) {
        const int page = from + i * THREADS + thread;
        const bool there = page < used && bin_of(stats[page].x, top) <= limit;
        const u32 mask = __ballot_sync(~0u, there);
        u32 at = 0;
        if (mask && lane == 0) at = atomicAdd(&sh.page_count, (u32)__popc(mask));
        at = __shfl_sync(~0u, at, 0) + __popc(mask & ((1u << lane) - 1));
        if (there) sh.pages[at] = page;
      }
      __syncthreads();
      const int count = sh.page_count;
      for (int i = warp; i < count; i += WARPS * MANY) {
        float2 s[MANY];
        int pages[MANY];
#pragma unroll
        for (int k = 0; k < MANY; ++k) {
          pages[k] = i + k * WARPS < count ? (int)sh.pages[i + k * WARPS] : -1;
          if (pages[k] >= 0) s[k] = *(const float2*)(scores + pages[k] * forge::PAGE + 2 * lane);
        }
#pragma unroll
        for (int k = 0; k < MANY; ++k) {
          if (pages[k] < 0) break;
          const int token = pages[k] * forge::PAGE + 2 * lane;
          use(token < length && bin_of(s[k].x, top) <= limit, token_value(s[k].x, token));
          use(token + 1 < length && bin_of(s[k].y, top) <= limit, token_value(s[k].y, token + 1));
        }
      }
    }
  }
  // Calls use(value) by single threads for the tokens themselves; `kept` says that they are in shared memory.
  template <class Use>
  __device__ __forceinline__ void each(bool kept, int count, Use use) const {
    if (kept) {
      for (int i = threadIdx.x; i < count; i += THREADS) use(sh.tokens[i]);
    } else {
      read([&](bool there, u64 value) {
        if (there) use(value);
      });
    }
  }
};

// The first bin up to which `wanted` are reached, for all threads: its number and what is still wanted within it.
__device__ __forceinline__ int deciding_bin(Shared& sh, u64& wanted) {
  const int thread = threadIdx.x;
  __syncthreads();
  const u64 mine = sh.bin(thread), upto = block_scan(mine, sh.sums);
  if (upto >= wanted && upto - mine < wanted) {
    sh.found = thread;
    sh.remaining = wanted - (upto - mine);
  }
  __syncthreads();
  wanted = sh.remaining;
  return sh.found;
}
__device__ __forceinline__ void clear_bins(Shared& sh) {
  __syncthreads();
  sh.low[threadIdx.x] = sh.high[threadIdx.x] = sh.counts[threadIdx.x] = 0;
  if (threadIdx.x == 0) sh.listed = sh.counted = 0;
  __syncthreads();
}

FORGE_KERNEL(THREADS) sparse_threshold(FORGE_PARAMS p) {
  extern __shared__ __align__(16) u8 memory[];
  Shared& sh = *(Shared*)memory;
  const int thread = threadIdx.x, row = blockIdx.x;
  const int length = __ldg(p.lengths + row / (p.q_heads * p.n)), used = (length + forge::PAGE - 1) / forge::PAGE;
  const float* scores = p.scores + (i64)row * p.pages * forge::PAGE;
  const float2* stats = p.stats + (i64)row * p.pages;
  const bool by_mass = p.top_p > 0.f;

  float most = NEG_INF;
  bool bad = false;
  for (int i = thread; i < used; i += THREADS) {
    const float2 s = stats[i];
    most = fmaxf(most, s.x);
    bad |= !(s.y >= 0.f);
  }
  const float top = block_max(most, sh.sums);
  bad = __syncthreads_or(bad);
  u64 packed = 0;
  clear_bins(sh);
  if (!bad)
    for (int i = thread; i < used; i += THREADS) {
      const float2 s = stats[i];
      const u64 mass = (u64)(s.y * ex2((s.x - top) * LOG2E) * FIXED);
      const int bin = bin_of(s.x, top);
      packed += mass;
      if (by_mass) {
        atomicAdd(&sh.counts[bin], 1u);
        sh.add(bin, mass);
      } else {
        atomicAdd(&sh.low[bin], 1u);
      }
    }
  packed = block_sum(packed, sh.sums);
  const float exact = p.exact_lse && used ? ex2((__ldg(p.exact_lse + row) - top) * LOG2E) : 0.f;
  const double total = (double)packed + (double)exact * FIXED;
  const u64 may_drop = by_mass ? (u64)fmin((1. - (double)p.top_p) * total, 9e18) : 0;
  const int budget = min(p.budgets ? __ldg(p.budgets + row / p.n % p.q_heads) : p.budget, length);
  if (bad || used == 0 || (by_mass ? packed <= may_drop : budget <= 0)) {
    if (thread == 0) {
      p.threshold[row] = bad ? __int_as_float(0x7fc00000) : __int_as_float(0x7f800000);
      p.last[row] = -1;
      p.kept[row] = 0;
      p.dropped[row] = used ? (float)((double)packed / total) : 0.f;
      p.top[row] = top;
    }
    return;
  }

  // The bins that may hold kept tokens.
  u64 upto = block_scan(by_mass ? (u64)sh.counts[thread] : sh.bin(thread), sh.sums);
  bool enough = upto >= (u64)budget;
  if (by_mass) {
    const u64 below = packed - block_scan(sh.bin(thread), sh.sums);
    const float each =
        ex2(-(float)(thread + 1) / BIN * LOG2E) * 1.001f * forge::PAGE;  // of a page's tokens in later bins
    enough = (double)below + (double)upto * each * FIXED <= (double)may_drop;
  }
  const u32 first = block_max(enough ? (u32)(BINS - thread) : 0u, sh.sums);
  const Tokens tokens{sh, scores, stats, used, length, first ? BINS - (int)first : BINS - 1, top};

  // Their tokens, and the bin of the last one kept.
  clear_bins(sh);
  u64 all = 0;
  tokens.read([&](bool there, u64 value) {
    const u32 mask = __ballot_sync(~0u, there);
    if (!mask) return;
    u32 at = 0;
    if ((thread & 31) == 0) at = atomicAdd(&sh.counted, (u32)__popc(mask));
    at = __shfl_sync(~0u, at, 0) + __popc(mask & ((1u << (thread & 31)) - 1));
    if (!there) return;
    const float score = score_of(value);
    const u64 weight = by_mass ? fixed_mass(score, top) : 1;
    all += weight;
    sh.add(bin_of(score, top), weight);
    if (at < CAPACITY) sh.tokens[at] = value;
  });
  __syncthreads();
  const int counted = sh.counted;
  const bool held_here = counted <= CAPACITY;
  u64 wanted = min(by_mass ? packed - may_drop : (u64)budget, block_sum(all, sh.sums));  // rounding may leave less
  int bin = deciding_bin(sh, wanted);

  // Tokens of that bin to the short list; those before it are kept.
  u64 lowest = 0, highest = ~0ull, held, kept;
  for (int turn = 0;; ++turn) {
    u64 least = ~0ull, most_value = 0;
    held = kept = 0;
    clear_bins(sh);
    tokens.each(held_here, counted, [&](u64 value) {
      const float score = score_of(value);
      const int order = turn ? (value > highest ? -1 : value < lowest ? 1 : 0) : bin_of(score, top) - bin;
      if (order > 0) return;
      if (order < 0) {
        ++kept;
        held += fixed_mass(score, top);
        return;
      }
      least = min(least, value);
      most_value = max(most_value, value);
      const u32 at = atomicAdd(&sh.listed, 1u);
      if (at < SHORT) sh.list[at] = value;
    });
    __syncthreads();
    if (sh.listed <= SHORT) break;
    lowest = ~block_max(~least, sh.sums);
    highest = block_max(most_value, sh.sums);
    const int shift = max(0, 64 - __clzll(highest - lowest) - 10);
    clear_bins(sh);
    tokens.each(held_here, counted, [&](u64 value) {
      if (value >= lowest && value <= highest)
        sh.add(BINS - 1 - (int)((value - lowest) >> shift), by_mass ? fixed_mass(score_of(value), top) : 1);
    });
    bin = BINS - 1 - deciding_bin(sh, wanted);
    lowest += (u64)bin << shift;
    highest = min(highest, lowest + ((1ull << shift) - 1));
  }
  kept = block_sum(kept, sh.sums);
  held = block_sum(held, sh.sums);
  const int listed = sh.listed;
  u64* masses = sh.tokens;  // of the short list, now that the tokens are not needed any more
  for (int i = thread; i < listed; i += THREADS) masses[i] = fixed_mass(score_of(sh.list[i]), top);
  __syncthreads();
  for (int i = thread; i < listed; i += THREADS) {
    const u64 value = sh.list[i];
    u64 mass = 0;
    u32 rank = 0;
    for (int j = 0; j < listed; ++j)
      if (sh.list[j] > value) {
        ++rank;
        mass += masses[j];
      }
    const u64 before = by_mass ? mass : rank, own = by_mass ? masses[i] : 1;
    if (before >= wanted || before + own < wanted) continue;  // true of one token alone
    held += mass + masses[i];
    p.threshold[row] = score_of(value);
    p.last[row] = position_of(value);
    p.kept[row] = (int)kept + rank + 1;
    p.dropped[row] = packed > held ? (float)((double)(packed - held) / total) : 0.f;
    p.top[row] = top;
  }
}
