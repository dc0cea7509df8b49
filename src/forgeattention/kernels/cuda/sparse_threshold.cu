// The exact threshold of one query (see ops/sparse.py): the K-th largest score, or the smallest of the fewest scores that carry a
// share of the softmax mass. Grid: one CTA per query.
//
// The pages' maxima first give a bound under which no kept token can lie: bins of 1/16 nat below the largest score. Pages that
// reach it give up their tokens from that bin on to a list in shared memory, and a radix select over the list ends it. A list that
// overflows is not kept; then every pass reads the pages again.
//
// Macros: FA_PARAMS_BYTES.
#include "common.cuh"

constexpr int THREADS = 1024, WARPS = THREADS / 32, BINS = 1024, CAPACITY = 12288;
constexpr float BIN = 16.f;
// Masses are fixed point in units of exp(top) / 2^32, so that sums do not depend on their order.
constexpr float FIXED = 4294967296.f;

struct Params {
  const float* scores;     // [rows, 64 pages]
  const float2* stats;     // [rows, pages]
  const int* lengths;      // [batch]
  const int* budgets;      // [q_heads], or null for `budget`
  const float* exact_lse;  // [rows], or null
  float* threshold;        // [rows]
  int *last, *kept;        // [rows]
  float *dropped, *top;    // [rows]; top is the largest score
  int q_heads, n, pages, budget;
  float top_p;             // 0 for a number of tokens
};
static_assert(sizeof(Params) == FA_PARAMS_BYTES, "the launcher's structure differs");

__device__ __forceinline__ u32 ordered(float x) {
  const u32 bits = __float_as_uint(x + 0.f);  // -0 is 0
  return bits ^ ((u32)((int)bits >> 31) | 0x80000000u);
}
__device__ __forceinline__ float unordered(u32 key) {
  return __uint_as_float(key & 0x80000000u ? key ^ 0x80000000u : ~key);
}
__device__ __forceinline__ int bin_of(float score, float top) {
  return (int)fminf((top - score) * BIN, (float)(BINS - 1));
}
__device__ __forceinline__ u64 fixed_mass(float score, float top) { return (u64)(ex2((score - top) * LOG2E) * FIXED); }

struct Shared {
  u32 keys[CAPACITY], positions[CAPACITY];
  u64 mass[BINS];
  u32 count[BINS];
  u64 sums[WARPS];
  u32 listed;
};

// The sum (or, as `max`, the largest) over the CTA, in every thread.
template <class T, class Join>
__device__ __forceinline__ T block_join(T x, Shared& sh, Join join) {
  const int thread = threadIdx.x;
#pragma unroll
  for (int i = 16; i; i >>= 1) x = join(x, __shfl_xor_sync(~0u, x, i));
  __syncthreads();
  if ((thread & 31) == 0) ((T*)sh.sums)[thread >> 5] = x;
  __syncthreads();
  x = ((T*)sh.sums)[thread & 31];
#pragma unroll
  for (int i = 16; i; i >>= 1) x = join(x, __shfl_xor_sync(~0u, x, i));
  return x;
}
template <class T>
__device__ __forceinline__ T block_sum(T x, Shared& sh) {
  return block_join(x, sh, [](T a, T b) { return a + b; });
}
template <class T>
__device__ __forceinline__ T block_max(T x, Shared& sh) {
  return block_join(x, sh, [](T a, T b) { return a > b ? a : b; });
}
// Sum over the threads up to this one.
template <class T>
__device__ __forceinline__ T block_scan(T x, Shared& sh) {
  const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5;
#pragma unroll
  for (int i = 1; i < 32; i <<= 1) {
    const T other = __shfl_up_sync(~0u, x, i);
    if (lane >= i) x += other;
  }
  __syncthreads();
  if (lane == 31) ((T*)sh.sums)[warp] = x;
  __syncthreads();
  for (int w = 0; w < warp; ++w) x += ((T*)sh.sums)[w];
  return x;
}

// Tokens of the pages in bins up to `limit` that are themselves in those bins: call use(found, key, position), by whole warps.
template <class Use>
__device__ __forceinline__ void candidates(const float* scores, const float2* stats, int used, int length, float top, int limit,
                                           Use use) {
  constexpr int MANY = 4;  // pages whose loads are in flight at once
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  for (int from = warp * 32; from < used; from += THREADS) {
    u32 mask = __ballot_sync(~0u, from + lane < used && bin_of(stats[from + lane].x, top) <= limit);
    while (mask) {
      float2 s[MANY];
      int pages[MANY];
#pragma unroll
      for (int i = 0; i < MANY; ++i) {
        pages[i] = mask ? from + __ffs(mask) - 1 : -1;
        mask &= mask - 1;
        if (pages[i] >= 0) s[i] = *(const float2*)(scores + pages[i] * fa::PAGE + 2 * lane);
      }
#pragma unroll
      for (int i = 0; i < MANY; ++i) {
        if (pages[i] < 0) break;
        const int token = pages[i] * fa::PAGE + 2 * lane;
        use(token < length && bin_of(s[i].x, top) <= limit, ordered(s[i].x), token);
        use(token + 1 < length && bin_of(s[i].y, top) <= limit, ordered(s[i].y), token + 1);
      }
    }
  }
}

// The listed tokens, or what would have been listed.
struct List {
  const Shared& sh;
  const float* scores;
  const float2* stats;
  int used, length;
  float top;
  int limit, listed;

  // Calls use(key, position), by single threads.
  template <class Use>
  __device__ __forceinline__ void operator()(Use use) const {
    if (listed <= CAPACITY) {
      for (int i = threadIdx.x; i < listed; i += THREADS) use(sh.keys[i], sh.positions[i]);
    } else {
      candidates(scores, stats, used, length, top, limit, [&](bool found, u32 key, int position) {
        if (found) use(key, (u32)position);
      });
    }
  }
};

extern "C" __global__ void __launch_bounds__(THREADS) sparse_threshold(const __grid_constant__ Params p) {
  extern __shared__ __align__(16) u8 memory[];
  Shared& sh = *(Shared*)memory;
  const int thread = threadIdx.x, row = blockIdx.x;
  const int length = __ldg(p.lengths + row / (p.q_heads * p.n)), used = (length + fa::PAGE - 1) / fa::PAGE;
  const float* scores = p.scores + (i64)row * p.pages * fa::PAGE;
  const float2* stats = p.stats + (i64)row * p.pages;
  const bool by_mass = p.top_p > 0.f;

  float most = NEG_INF;
  bool bad = false;
  for (int i = thread; i < used; i += THREADS) {
    const float2 s = stats[i];
    most = fmaxf(most, s.x);
    bad |= !(s.y >= 0.f);
  }
  const float top = block_max(most, sh);
  bad = __syncthreads_or(bad);
  u64 packed = 0;
  sh.count[thread] = 0;
  sh.mass[thread] = 0;
  __syncthreads();
  if (!bad)
    for (int i = thread; i < used; i += THREADS) {
      const float2 s = stats[i];
      const u64 mass = (u64)(s.y * ex2((s.x - top) * LOG2E) * FIXED);
      const int bin = bin_of(s.x, top);
      packed += mass;
      atomicAdd(&sh.count[bin], 1u);
      if (by_mass) atomicAdd(&sh.mass[bin], mass);
    }
  packed = block_sum(packed, sh);
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
  const u32 upto = block_scan(sh.count[thread], sh);
  bool enough = upto >= (u32)budget;
  if (by_mass) {
    const u64 below = packed - block_scan(sh.mass[thread], sh);
    const float each = ex2(-(float)(thread + 1) / BIN * LOG2E) * 1.001f * fa::PAGE;  // of a page's tokens in later bins
    enough = (double)below + (double)upto * each * FIXED <= (double)may_drop;
  }
  const int limit = min(BINS - 1, (int)(0xFFFFFFFFu - block_max(enough ? 0xFFFFFFFFu - (u32)thread : 0u, sh)));
  const int bins = limit < 0 ? BINS - 1 : limit;

  if (thread == 0) sh.listed = 0;
  __syncthreads();
  u32 lowest = 0xFFFFFFFFu, highest = 0;
  candidates(scores, stats, used, length, top, bins, [&](bool found, u32 key, int position) {
    const u32 mask = __ballot_sync(~0u, found);
    if (!mask) return;
    u32 at = 0;
    if ((thread & 31) == 0) at = atomicAdd(&sh.listed, (u32)__popc(mask));
    at = __shfl_sync(~0u, at, 0) + __popc(mask & ((1u << (thread & 31)) - 1));
    if (!found) return;
    lowest = min(lowest, key);
    highest = max(highest, key);
    if (at < CAPACITY) {
      sh.keys[at] = key;
      sh.positions[at] = position;
    }
  });
  __syncthreads();
  const int listed = sh.listed;
  const u32 floor = 0xFFFFFFFFu - block_max(0xFFFFFFFFu - lowest, sh), range = block_max(highest, sh) - floor;
  const List each{sh, scores, stats, used, length, top, bins, listed};

  u64 wanted = budget;
  if (by_mass) {
    u64 mass = 0;
    each([&](u32 key, u32) { mass += fixed_mass(unordered(key), top); });
    mass = block_sum(mass, sh);
    wanted = min(packed - may_drop, mass);
  } else {
    wanted = min(wanted, (u64)listed);
  }
  // The largest key from which on the weights reach what is wanted, a byte of (key - floor) at a time.
  u32 prefix = 0;
  for (int shift = range ? (31 - __clz(range)) / 8 * 8 : -8; shift >= 0; shift -= 8) {
    __syncthreads();
    if (thread < 256) sh.mass[thread] = 0;
    __syncthreads();
    each([&](u32 key, u32) {
      const u32 d = key - floor;
      if (shift == 24 ? prefix == 0 : d >> (shift + 8) == prefix)
        atomicAdd(&sh.mass[255 - (d >> shift & 255)], by_mass ? fixed_mass(unordered(key), top) : 1ull);
    });
    __syncthreads();
    const u64 mine = thread < 256 ? sh.mass[thread] : 0, sum = block_scan(mine, sh);
    __syncthreads();
    if (thread < 256 && sum >= wanted && sum - mine < wanted) {
      sh.listed = 255 - thread;
      sh.mass[0] = wanted - (sum - mine);
    }
    __syncthreads();
    prefix = prefix << 8 | sh.listed;
    wanted = sh.mass[0];
  }
  const u32 limit_key = floor + prefix;
  const float threshold = unordered(limit_key);

  // Ties: as many of the earliest as are still wanted.
  const u64 weight = by_mass ? fixed_mass(threshold, top) : 1;
  const u32 ties = weight ? (u32)min((wanted + weight - 1) / weight, (u64)length) : length;
  u32 found = 0, farthest = 0;
  each([&](u32 key, u32 position) {
    if (key != limit_key) return;
    ++found;
    farthest = max(farthest, position);
  });
  found = block_sum(found, sh);
  u32 last = block_max(farthest, sh);
  if (found > ties) {
    u32 low = 0;  // the smallest position with so many ties up to it lies in [low, last]
    while (low < last) {
      const u32 middle = (low + last) / 2;
      u32 before = 0;
      each([&](u32 key, u32 position) { before += key == limit_key && position <= middle; });
      before = block_sum(before, sh);
      if (before >= ties) last = middle;
      else low = middle + 1;
    }
  }
  u64 held = 0;
  u32 kept = 0;
  each([&](u32 key, u32 position) {
    if (key > limit_key || (key == limit_key && position <= last)) {
      ++kept;
      held += fixed_mass(unordered(key), top);
    }
  });
  kept = block_sum(kept, sh);
  held = block_sum(held, sh);
  if (thread == 0) {
    p.threshold[row] = threshold;
    p.last[row] = (int)last;
    p.kept[row] = (int)kept;
    p.dropped[row] = packed > held ? (float)((double)(packed - held) / total) : 0.f;
    p.top[row] = top;
  }
}
