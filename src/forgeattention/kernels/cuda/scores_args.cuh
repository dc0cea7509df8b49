// What qk_scores and value_sum share: eight queries of one KV head over some of a row's pages, a warp per page.
//
// Macros besides those of page.cuh: FORGE_WARPS, FORGE_ROTATION, FORGE_TYPE (queries).
#pragma once
#include "page.cuh"
#include "transform.cuh"

constexpr int WARPS = FORGE_WARPS, E = DIM / 32, QUERIES = 8;

// 16-byte pieces of a record's part to shared memory, by one warp.
template <int BYTES>
__device__ __forceinline__ void copy_part(u8* to, const u8* from, int lane) {
  for (int i = lane * 16; i < BYTES; i += 512) *(uint4*)(to + i) = __ldg((const uint4*)(from + i));
}
