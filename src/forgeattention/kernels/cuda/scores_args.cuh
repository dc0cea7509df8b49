// What qk_scores and value_sum share: eight queries of one KV head over some of a row's pages, a warp per page.
//
// Macros besides those of page.cuh: FORGE_WARPS, FORGE_ROTATION, FORGE_TYPE (queries), FORGE_PARAMS_BYTES.
#pragma once
#include "page.cuh"
#include "transform.cuh"

constexpr int WARPS = FORGE_WARPS, E = DIM / 32, QUERIES = 8;

struct Params {
  const void* q;       // qk_scores: FORGE_TYPE [batch, q_heads, n, head_dim]; value_sum: float weights [.., max_length], contiguous
  const u8* base;      // added to offsets; null if they are addresses
  const i64* offsets;  // [batch, max_pages] bytes
  const int* lengths;  // [batch] tokens
  float* out;          // qk_scores: [batch, q_heads, n, max_length]; value_sum: [splits, batch, q_heads, n, head_dim]
  TransformArgs transform;  // of keys; of values
  i64 q_stride[3];     // elements: row, head, token
  i64 max_pages;
  int kv_heads, group, n, queries, blocks, max_length;  // queries = group * n, in blocks of 8
  float scale, unit;
};
static_assert(sizeof(Params) == FORGE_PARAMS_BYTES, "the launcher's structure differs");

// 16-byte pieces of a record's part to shared memory, by one warp.
template <int BYTES>
__device__ __forceinline__ void copy_part(u8* to, const u8* from, int lane) {
  for (int i = lane * 16; i < BYTES; i += 512) *(uint4*)(to + i) = __ldg((const uint4*)(from + i));
}
