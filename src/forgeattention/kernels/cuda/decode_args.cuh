// Arguments of decode attention, and how its work is cut into items.
//
// Macros besides those of page.cuh: FA_QUERIES (4, 8 or 16 queries of one KV head at a time), FA_WARPS, FA_STAGES, FA_CTAS (per
// multiprocessor), FA_ROTATION, FA_TYPE (queries and output), FA_EXACT_TYPE, FA_PARAMS_BYTES.
#pragma once
#include "page.cuh"
#include "transform.cuh"

constexpr int WARPS = FA_WARPS, STAGES = FA_STAGES, QUERIES = FA_QUERIES;
constexpr bool DUP = QUERIES == 4;
constexpr int BLOCKS = QUERIES <= 8 ? 1 : QUERIES / 8;
constexpr int E = DIM / 32;
// Accumulators of one lane when a warp is done.
constexpr int KEPT = DUP ? DIM / 8 : BLOCKS * DIM / 4;
constexpr float WEIGHT_MAX = 65500.f;

struct Params {
  const void* q;               // FA_TYPE [batch, q_heads, n, head_dim]
  const u8* base;              // added to offsets; null if they are addresses
  const i64* offsets;          // [batch, max_pages] bytes
  const int* lengths;          // [batch] packed tokens, or null
  const void *exact_k, *exact_v;  // FA_EXACT_TYPE [batch, kv_heads, capacity, head_dim], 16-byte aligned rows
  const int* exact_lengths;    // [batch], or null
  const float* sink_logits;    // [q_heads], or null
  void* out;                   // FA_TYPE [batch, q_heads, n, head_dim], contiguous
  float* lse;                  // [batch, q_heads, n]
  float* part;                 // [batch, kv_heads, blocks, slots, QUERIES, DIM]
  float2* part_ml;             // the same without DIM: (maximum in log2 units, sum)
  u32* counter;                // [batch, kv_heads, blocks], zero before and after
  TransformArgs k_transform, v_transform;
  i64 q_stride[3], k_stride[3], v_stride[3];  // elements: row, head, token
  i64 max_pages;
  int batch, kv_heads, group, n, queries, blocks, causal;  // queries = group * n
  int chunks_short, chunks_long, long_pages;  // chunks of a row's head: chunks_long from long_pages pages on
  int min_pages, exact_per_page, slots;       // slots = chunks a head may have, then WARPS for the exact tokens
  float scale_log2, k_unit, v_unit;
};
static_assert(sizeof(Params) == FA_PARAMS_BYTES, "the launcher's structure differs");

// How a row is cut. Chunk 0 takes the exact tokens (as many pages' worth as they cost) and `first` pages, the others `size`.
struct Cut {
  int pages, exact, first, size, chunks;
  __device__ __forceinline__ Cut(const Params& p, int length, int exact_length) {
    pages = (length + fa::PAGE - 1) / fa::PAGE;
    exact = exact_length;
    const int cost = (exact + p.exact_per_page - 1) / p.exact_per_page, total = pages + cost;
    const int wanted = pages >= p.long_pages ? p.chunks_long : p.chunks_short;
    const int count = max(1, min(wanted, total / p.min_pages));
    size = max(1, (total + count - 1) / count);
    first = max(0, min(pages, size - cost));
    chunks = 1 + (pages - first + size - 1) / size;
  }
};

struct __align__(16) Item {
  int row, head, block, chunk, chunks;  // chunks 0: past the last item
  int length, exact;                    // tokens of the row
  int begin, end;                       // pages

  // The item of this number. Called by a whole warp; every lane has the result.
  __device__ __forceinline__ void find(const Params& p, int number, int lane) {
    for (int row0 = 0; row0 < p.batch; row0 += 32) {
      const int r = row0 + lane;
      int tokens = 0, recent = 0, count = 0;
      if (r < p.batch) {
        tokens = p.lengths ? __ldg(p.lengths + r) : 0;
        recent = p.exact_lengths ? __ldg(p.exact_lengths + r) : 0;
        count = Cut(p, tokens, recent).chunks * p.kv_heads * p.blocks;
      }
      int last = count;
#pragma unroll
      for (int i = 1; i < 32; i <<= 1) {
        const int other = __shfl_up_sync(~0u, last, i);
        if (lane >= i) last += other;
      }
      const u32 hit = __ballot_sync(~0u, number < last);
      if (hit) {
        const int src = __ffs(hit) - 1;
        row = row0 + src;
        length = __shfl_sync(~0u, tokens, src);
        exact = __shfl_sync(~0u, recent, src);
        const int at = number - __shfl_sync(~0u, last - count, src);
        const Cut cut(p, length, exact);
        chunks = cut.chunks;
        chunk = at % chunks;
        block = at / chunks % p.blocks;
        head = at / chunks / p.blocks;
        begin = chunk ? cut.first + (chunk - 1) * cut.size : 0;
        end = chunk ? min(cut.pages, begin + cut.size) : cut.first;
        return;
      }
      number -= __shfl_sync(~0u, last, 31);
    }
    chunks = begin = end = 0;
  }
};

// Shared memory; backends/cuda.py computes the same sizes.
constexpr int MERGE_WARPS = FA_CTAS == 1 && DIM <= 128 && QUERIES <= 8 ? WARPS / 2 : 2;
constexpr int SCALE_BYTES = WARPS * 128 * 4;

struct Shared {
  u8* ring;      // [WARPS][STAGES][RECORD]
  u8* terms;     // of the queries, [BLOCKS][QUERY_BYTES]
  float* step;   // [QUERIES] 256 step of a query
  float* shift;  // [QUERIES] q . mu
  u64* barriers;
  Item* items;   // [3] the one at work, the next and the one after
  u32* constants;  // [CONSTANT_WORDS]
  u8* scratch;   // while pages are read: scales [WARPS][128] and the plain queries; then what the merges need
  __device__ __forceinline__ Shared(u8* at) {
    ring = at;
    terms = ring + WARPS * STAGES * RECORD;
    step = (float*)(terms + BLOCKS * QUERY_BYTES);
    shift = step + QUERIES;
    barriers = (u64*)(shift + QUERIES);
    items = (Item*)(barriers + WARPS * STAGES * 2);
    constants = (u32*)(items + 3);
    scratch = (u8*)(constants + CONSTANT_WORDS);
  }
  __device__ __forceinline__ float* scales(int warp) const { return (float*)scratch + warp * 128; }
  __device__ __forceinline__ float* plain() const { return (float*)(scratch + SCALE_BYTES); }
};
