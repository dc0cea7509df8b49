// Arguments of decode attention, and how its work is cut.
//
// Macros besides those of page.cuh: FORGE_QUERIES (4, 8 or 16 queries of one KV head at a time), FORGE_WARPS, FORGE_PAGES (a warp's at a
// time, 1 or 2), FORGE_GROUPS (of FORGE_PAGES records, that a warp's ring holds), FORGE_CTAS (per multiprocessor), FORGE_ROTATION, FORGE_TYPE
// (queries and output), FORGE_EXACT_TYPE, FORGE_EXACT_BLOCK (tokens of a block of exact tokens; 0: a row's lie side by side),
// FORGE_PARAMS_BYTES.
#pragma once
#include "page.cuh"
#include "transform.cuh"

constexpr int WARPS = FORGE_WARPS, GROUPS = FORGE_GROUPS, QUERIES = FORGE_QUERIES, PAGES = FORGE_PAGES;
constexpr int BLOCKS = QUERIES / 4;
constexpr int E = DIM / 32;
constexpr float WEIGHT_MAX = 65500.f;
constexpr int EXACT_TOKENS = 16;  // of a task

struct Params {
  const void* q;               // FORGE_TYPE [batch, q_heads, n, head_dim]
  const u8* base;              // added to offsets; null if they are addresses
  const i64* offsets;          // [batch, max_pages] bytes
  const int* lengths;          // [batch] packed tokens, or null
  const void *exact_k, *exact_v;  // FORGE_EXACT_TYPE [batch, kv_heads, capacity, head_dim], 16-byte aligned rows
  const int* exact_lengths;    // [batch], or null
  const int* exact_blocks;     // [batch, exact_stride], if FORGE_EXACT_BLOCK: then k_stride and v_stride are those of blocks, heads, tokens
  const float* sink_logits;    // [q_heads], or null
  void* out;                   // FORGE_TYPE [batch, q_heads, n, head_dim]
  float* lse;                  // [batch, q_heads, n]
  float* part;                 // [batch, kv_heads, blocks, slots, QUERIES, DIM]: a slot per chunk, then one per task of exact tokens
  float2* part_ml;             // the same without DIM: (maximum in log2 units, sum)
  u32* counter;                // [batch, kv_heads, blocks], zero before and after
  TransformArgs k_transform, v_transform;
  i64 q_stride[3], k_stride[3], v_stride[3], out_stride[3];  // elements: row, head, token
  i64 max_pages, exact_stride;
  int kv_heads, group, n, queries, blocks, causal;  // queries = group * n
  int chunks, min_pages, slots;  // a row's head has at most `chunks`, of at least `min_pages` pages each
  int max_length;                // tokens that no row exceeds, and most rows have
  float scale_log2, k_unit, v_unit;
};
static_assert(sizeof(Params) == FORGE_PARAMS_BYTES, "the launcher's structure differs");

// How a row's work for one KV head is cut: by the row's own lengths alone, so that its result does not depend on the batch.
// Chunks are runs of pages; exact tokens are dealt out to the chunks' warps in tasks.
struct Cut {
  int pages, chunks, tasks;
  __device__ __forceinline__ Cut(const Params& p, int length, int exact)
      : pages((length + forge::PAGE - 1) / forge::PAGE),
        chunks(max(1, min(p.chunks, pages / p.min_pages))),
        tasks((exact + EXACT_TOKENS - 1) / EXACT_TOKENS) {}
  // First page of a chunk; chunks begin at whole groups.
  __device__ __forceinline__ int begin(int chunk) const {
    return min(pages, (pages + PAGES - 1) / PAGES * chunk / chunks * PAGES);
  }
};

// A CTA's part of the work.
struct Item {
  int row, head, block, chunk;
  int length, exact;  // tokens of the row
};

// Shared memory; backends/cuda/plans.py computes the same sizes.
constexpr int QUERY_ROWS = QUERIES < 8 ? QUERIES : 8;
constexpr int ROW_BYTES = 4 * DIM;  // of a query's 16-bit fragments
struct Shared {
  u8* ring;      // [WARPS][GROUPS][PAGES][RECORD]; when pages are done, what the merges need
  u8* terms;     // [QUERIES][QUERY_BYTES]
  u8* plain;     // queries as 16-bit fragments, see exact.cuh
  float* scales;  // [WARPS][PAGES][PAGE] of the pages at work, of keys, then of values
  u64* barriers;  // [WARPS][GROUPS][2]
  u32* constants;  // [CONSTANT_WORDS]
  float* step;   // [QUERIES] 256 step of a query
  float* shift;  // [QUERIES] q . mu
  float* size;   // [QUERIES] what the 16-bit fragments are multiplied by
  int* totals;   // [QUERIES][2] sums of the terms
  u32* last;     // whether this CTA is the last of its head
  __device__ __forceinline__ explicit Shared(u8* at) {
    ring = at;
    terms = ring + WARPS * GROUPS * PAGES * RECORD;
    plain = terms + QUERIES * QUERY_BYTES;
    scales = (float*)(plain + QUERIES * ROW_BYTES);
    barriers = (u64*)(scales + WARPS * PAGES * forge::PAGE);
    constants = (u32*)(barriers + WARPS * GROUPS * 2);
    step = (float*)(constants + CONSTANT_WORDS);
    shift = step + QUERIES;
    size = shift + QUERIES;
    totals = (int*)(size + QUERIES);
    last = (u32*)(totals + 2 * QUERIES);
  }
};
