#pragma once
#include "decode_args.cuh"

// The exact tokens of a row (sinks and recent ones): LANES lanes share a token, each warp keeps its own maximum, sum and output of QUADS queries at a time.
namespace exact {
constexpr int LANES = HEAD_DIM < 128 ? 8 : HEAD_DIM == 128 ? 16 : 32, CHANNELS = HEAD_DIM / LANES;
constexpr int AHEAD = CHANNELS <= 8 ? 2 : 1;            // tokens of a lane whose loads are under way together
constexpr int TOKENS = 32 / LANES, ROUND = AHEAD * TOKENS * WARPS;
constexpr int QUAD = FA_EXACT_TYPE == FLOAT ? 2 : 4;
constexpr int WORDS = CHANNELS * type_bytes<FA_EXACT_TYPE>() / 4;

__device__ __forceinline__ void load(const void* p, i64 at, u32 (&w)[WORDS]) {
  const u8* from = (const u8*)p + at * type_bytes<FA_EXACT_TYPE>();
  if constexpr (WORDS % 4 == 0) {
#pragma unroll
    for (int i = 0; i < WORDS; i += 4) {
      const uint4 v = __ldg((const uint4*)(from + 4 * i));
      w[i] = v.x, w[i + 1] = v.y, w[i + 2] = v.z, w[i + 3] = v.w;
    }
  } else {
#pragma unroll
    for (int i = 0; i < WORDS; ++i) w[i] = __ldg((const u32*)(from + 4 * i));
  }
}
__device__ __forceinline__ float element(const u32 (&w)[WORDS], int i) {
  if constexpr (FA_EXACT_TYPE == FLOAT) return __uint_as_float(w[i]);
  if constexpr (FA_EXACT_TYPE == BFLOAT) return __uint_as_float(i & 1 ? w[i / 2] & 0xFFFF0000u : w[i / 2] << 16);
  return half_to_float(i & 1 ? w[i / 2] >> 16 : w[i / 2] & 0xFFFFu);
}

__device__ __forceinline__ void attend(const Params& p, const Item& it, const Shared& sh, i64 slot, int warp, int lane) {
  const int sub = lane % LANES;
  const i64 k_at = it.row * p.k_stride[0] + it.head * p.k_stride[1] + sub * CHANNELS;
  const i64 v_at = it.row * p.v_stride[0] + it.head * p.v_stride[1] + sub * CHANNELS;
  for (int first = 0; first < QUERIES && it.block * QUERIES + first < p.queries; first += QUAD) {
    float acc[QUAD][CHANNELS], top[QUAD], sum[QUAD];
    int end[QUAD];
#pragma unroll
    for (int i = 0; i < QUAD; ++i) {
      const int query = it.block * QUERIES + first + i;
      end[i] = query < p.queries ? it.exact - (p.causal ? p.n - 1 - query % p.n : 0) : 0;
      top[i] = NO_MAX;
      sum[i] = 0.f;
#pragma unroll
      for (int c = 0; c < CHANNELS; ++c) acc[i][c] = 0.f;
    }
    u32 k[AHEAD][WORDS], v[AHEAD][WORDS];
    auto fetch = [&](int from) {
#pragma unroll
      for (int a = 0; a < AHEAD; ++a)
        if (from + a * TOKENS * WARPS < it.exact) {
          load(p.exact_k, k_at + (from + a * TOKENS * WARPS) * p.k_stride[2], k[a]);
          load(p.exact_v, v_at + (from + a * TOKENS * WARPS) * p.v_stride[2], v[a]);
        }
    };
    int token = warp * TOKENS + lane / LANES;
    fetch(token);
    for (int round = 0; round < it.exact; round += ROUND, token += ROUND) {
      float s[AHEAD][QUAD];
#pragma unroll
      for (int a = 0; a < AHEAD; ++a) {
        float x[CHANNELS];
#pragma unroll
        for (int c = 0; c < CHANNELS; ++c) x[c] = element(k[a], c);
#pragma unroll
        for (int i = 0; i < QUAD; ++i) {
          const float2* q = (const float2*)(sh.plain() + (first + i) * HEAD_DIM + sub * CHANNELS);
          s[a][i] = 0.f;
#pragma unroll
          for (int c = 0; c < CHANNELS; c += 2) s[a][i] = fmaf(q[c / 2].y, x[c + 1], fmaf(q[c / 2].x, x[c], s[a][i]));
        }
#pragma unroll
        for (int d = 1; d < LANES; d <<= 1)
#pragma unroll
          for (int i = 0; i < QUAD; ++i) s[a][i] += __shfl_xor_sync(~0u, s[a][i], d);
      }
#pragma unroll
      for (int a = 0; a < AHEAD; ++a) {
        float x[CHANNELS];
#pragma unroll
        for (int c = 0; c < CHANNELS; ++c) x[c] = element(v[a], c);
#pragma unroll
        for (int i = 0; i < QUAD; ++i) {
          if (token + a * TOKENS * WARPS >= end[i]) continue;
          const float score = s[a][i] * p.scale_log2, now = fmaxf(top[i], score), keep = ex2(top[i] - now), w = ex2(score - now);
          top[i] = now;
          sum[i] = fmaf(sum[i], keep, w);
#pragma unroll
          for (int c = 0; c < CHANNELS; ++c) acc[i][c] = fmaf(acc[i][c], keep, w * x[c]);
        }
      }
      fetch(token + ROUND);
    }
#pragma unroll
    for (int i = 0; i < QUAD; ++i) {
#pragma unroll
      for (int d = LANES; d < 32; d <<= 1) {
        const float other = __shfl_xor_sync(~0u, top[i], d), now = fmaxf(top[i], other), keep = ex2(top[i] - now);
        top[i] = now;
        sum[i] *= keep;
        sum[i] += __shfl_xor_sync(~0u, sum[i], d);
#pragma unroll
        for (int c = 0; c < CHANNELS; ++c) {
          acc[i][c] *= keep;
          acc[i][c] += __shfl_xor_sync(~0u, acc[i][c], d);
        }
      }
      const i64 at = (slot + warp) * QUERIES + first + i;
      if (lane == 0) p.part_ml[at] = make_float2(top[i], sum[i]);
      if (lane < LANES)
#pragma unroll
        for (int c = 0; c < CHANNELS; ++c) p.part[at * DIM + sub * CHANNELS + c] = acc[i][c];
    }
  }
}
}  // namespace exact
