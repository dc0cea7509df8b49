// Arguments of decode attention, and how its work is cut.
//
// Macros besides those of page.cuh: FORGE_QUERIES (4, 8 or 16 queries of one KV head at a time), FORGE_WARPS,
// FORGE_STAGE_PAGES (a warp's at a time, 1 or 2), FORGE_STAGES (of FORGE_STAGE_PAGES records, that a warp's ring
// holds), FORGE_CTAS (per multiprocessor), FORGE_ROTATION, FORGE_TYPE (queries and output), FORGE_EXACT_TYPE,
// FORGE_EXACT_BLOCK (tokens of a block of exact tokens; 0: a row's lie side by side).
#pragma once
#include "page.cuh"
#include "transform.cuh"

constexpr int WARPS = FORGE_WARPS, STAGES = FORGE_STAGES, QUERIES = FORGE_QUERIES, STAGE_PAGES = FORGE_STAGE_PAGES;
constexpr int BLOCKS = QUERIES / 4;
constexpr int E = DIM / 32;
constexpr float WEIGHT_MAX = 65500.f;
constexpr int EXACT_TOKENS = 16;  // of a task

// How a row's work for one KV head is cut: by the row's own lengths alone, so that its result does not depend on the
// batch. Splits are runs of pages; exact tokens are dealt out to the splits' warps in tasks.
struct Cut {
  int pages, splits, tasks;
  __device__ __forceinline__ Cut(const Params& p, int length, int exact)
      : pages((length + forge::PAGE - 1) / forge::PAGE),
        splits(max(1, min(p.num_splits, pages / p.min_pages))),
        tasks((exact + EXACT_TOKENS - 1) / EXACT_TOKENS) {}
  // First page of a split; splits begin at whole stages.
  __device__ __forceinline__ int begin(int split) const {
    return min(pages, (pages + STAGE_PAGES - 1) / STAGE_PAGES * split / splits * STAGE_PAGES);
  }
};

// A CTA's part of the work.
struct Item {
  int row, head, query_tile, split;
  int length, exact;  // tokens of the row
};

// Shared memory; where each part begins and how long it is says `decode_layout` in backends/cuda/plans.py.
constexpr int QUERY_ROWS = QUERIES < 8 ? QUERIES : 8;
constexpr int ROW_BYTES = 4 * DIM;  // of a query's 16-bit fragments
struct Shared {
  u8* ring;        // [WARPS][STAGES][STAGE_PAGES][RECORD]; when pages are done, what the merges need
  u8* terms;       // [QUERIES][QUERY_BYTES]
  u8* plain;       // queries as 16-bit fragments, see exact.cuh
  float* scales;   // [WARPS][STAGE_PAGES][PAGE] of the pages at work, of keys, then of values
  u64* barriers;   // [WARPS][STAGES][2]
  u32* constants;  // [CONSTANT_WORDS]
  float* step;     // [QUERIES] 256 step of a query
  float* shift;    // [QUERIES] q . mu
  float* size;     // [QUERIES] what the 16-bit fragments are multiplied by
  int* totals;     // [QUERIES][2] sums of the terms
  u32* last;       // whether this CTA is the last of its head
  __device__ __forceinline__ explicit Shared(u8* at) {
    ring = at + FORGE_AT_RING;
    terms = at + FORGE_AT_TERMS;
    plain = at + FORGE_AT_PLAIN;
    scales = (float*)(at + FORGE_AT_SCALES);
    barriers = (u64*)(at + FORGE_AT_BARRIERS);
    constants = (u32*)(at + FORGE_AT_CONSTANTS);
    step = (float*)(at + FORGE_AT_STEP);
    shift = (float*)(at + FORGE_AT_SHIFT);
    size = (float*)(at + FORGE_AT_SIZE);
    totals = (int*)(at + FORGE_AT_TOTALS);
    last = (u32*)(at + FORGE_AT_LAST);
  }
};
