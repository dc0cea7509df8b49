// The exact tokens of a row (sinks and recent ones) on 16-bit tensor cores, by tasks of one warp: products of eight queries
// (A: high terms in rows 0-7, low terms in rows 8-15) with 16 keys, then of their weights, split alike, with values. Float
// tokens are two bfloat16 terms each.
#pragma once
#include "decode_args.cuh"

namespace exact {
constexpr int TERM = FA_EXACT_TYPE == HALF ? HALF : BFLOAT;
constexpr bool TWO = FA_EXACT_TYPE == FLOAT;  // terms of a token
constexpr int TILES = 4;                      // of 16 tokens in a task, at most
static_assert(HEAD_DIM % 16 == 0, "a lane reads eight channels at a time");

// Channel c of a query is in product step, lane and register of the A fragment as keys are read: lane t takes channels 8 t .. 8 t + 7
// of 32, four for each of two products. Keeps a query that lies across the warp (element lane + 32 k). Returns its factor.
__device__ __forceinline__ float keep_query(const float (&x)[E], u8* plain, int query, int lane) {
  float top = 1e-30f;
#pragma unroll
  for (int k = 0; k < E; ++k) top = fmaxf(top, fabsf(x[k]));
  const u32 exponent = __float_as_uint(warp_max(top)) >> 23;  // a power of two leaves halves as they are
  const float inverse = __uint_as_float((254 - exponent) << 23);
  u8* rows = plain + query / 8 * 8 * ROW_BYTES;
#pragma unroll
  for (int k = 0; k < E; ++k) {
    u32 high, low;
    split_16<TERM>(x[k] * inverse, 0.f, high, low);
    const int step = 2 * k + (lane >> 2 & 1), t = lane >> 3;
    unsigned short* at = (unsigned short*)(rows + ((step * QUERY_ROWS + (query & 7)) * 4 + t) * 16) + (lane >> 1 & 1) * 4 + (lane & 1);
    at[0] = (unsigned short)high;
    at[2] = (unsigned short)low;
  }
  return __uint_as_float(exponent << 23);
}

// Eight channels of a token as words of two; `second` are the second terms.
__device__ __forceinline__ void load(const void* p, i64 at, bool any, u32 (&first)[4], u32 (&second)[4]) {
  if constexpr (TWO) {
    float4 a = make_float4(0.f, 0.f, 0.f, 0.f), b = a;
    if (any) {
      a = __ldg((const float4*)((const float*)p + at));
      b = __ldg((const float4*)((const float*)p + at) + 1);
    }
    split_16<TERM>(a.x, a.y, first[0], second[0]);
    split_16<TERM>(a.z, a.w, first[1], second[1]);
    split_16<TERM>(b.x, b.y, first[2], second[2]);
    split_16<TERM>(b.z, b.w, first[3], second[3]);
  } else {
    uint4 v = make_uint4(0, 0, 0, 0);
    if (any) v = __ldg((const uint4*)((const unsigned short*)p + at));
    first[0] = v.x, first[1] = v.y, first[2] = v.z, first[3] = v.w;
  }
}

// Tokens from, from + 1, .. of one task; writes its output, maximum and sum to `slot`.
__device__ __forceinline__ void attend(const Params& p, const Item& it, const Shared& sh, int from, int tiles, i64 slot, int lane) {
  const int g = lane >> 2, t = lane & 3;
  const i64 k_at = it.row * p.k_stride[0] + it.head * p.k_stride[1], v_at = it.row * p.v_stride[0] + it.head * p.v_stride[1];
  for (int block = 0; block < QUERIES && it.block * QUERIES + block < p.queries; block += 8) {
    const int i = block + g, query = it.block * QUERIES + i;
    const bool any = i < QUERIES && query < p.queries;
    const int end = any ? it.exact - (p.causal ? p.n - 1 - query % p.n : 0) : 0;
    float s[TILES][4], top = NO_MAX;
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
      for (int k = 0; k < 4; ++k) s[tile][k] = NEG_INF;
      if (tile >= tiles) continue;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int first = from + 16 * tile + 8 * half, token = min(first + g, it.exact - 1);
        float d[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
        for (int b = 0; b < E; ++b) {
          const int channel = 32 * b + 8 * t;
          u32 k[2][4];
          load(p.exact_k, k_at + token * p.k_stride[2] + channel, channel < HEAD_DIM, k[0], k[1]);
#pragma unroll
          for (int step = 0; step < 2; ++step) {
            uint4 a = make_uint4(0, 0, 0, 0);
            if (QUERY_ROWS == 8 || g < QUERY_ROWS)
              a = *(const uint4*)(sh.plain + block * ROW_BYTES + (((2 * b + step) * QUERY_ROWS + g) * 4 + t) * 16);
            const u32 a4[4] = {a.x, a.y, a.z, a.w};
            mma_16<TERM>(d, a4, k[0][2 * step], k[0][2 * step + 1]);
            if constexpr (TWO) mma_16<TERM>(d, a4, k[1][2 * step], k[1][2 * step + 1]);
          }
        }
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          if (first + 2 * t + k < end) s[tile][2 * half + k] = (d[k] + d[2 + k]) * (sh.size[any ? i : 0] * p.scale_log2);
          top = fmaxf(top, s[tile][2 * half + k]);
        }
      }
    }
    top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
    top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
    float sum = 0.f;
    u32 w[TILES][4];
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float x = ex2(s[tile][2 * half] - top), y = ex2(s[tile][2 * half + 1] - top);
        sum += x + y;
        split_16<TERM>(x, y, w[tile][2 * half], w[tile][2 * half + 1]);
      }
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    if (any && t == 0) p.part_ml[slot * QUERIES + i] = make_float2(top, sum);
#pragma unroll
    for (int c = 0; c < HEAD_DIM; c += 64) {
      float acc[8][4];
#pragma unroll
      for (int k = 0; k < 8; ++k)
#pragma unroll
        for (int j = 0; j < 4; ++j) acc[k][j] = 0.f;
#pragma unroll
      for (int tile = 0; tile < TILES; ++tile) {
        if (tile >= tiles) continue;
        u32 v[4][2][4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int token = min(from + 16 * tile + 8 * (j >> 1) + 2 * t + (j & 1), it.exact - 1);
          load(p.exact_v, v_at + token * p.v_stride[2] + c + 8 * g, c + 8 * g < HEAD_DIM, v[j][0], v[j][1]);
        }
#pragma unroll
        for (int term = 0; term < 1 + TWO; ++term)
#pragma unroll
          for (int k = 0; k < 8; ++k) {
            const u32 pick = k & 1 ? 0x7632u : 0x5410u;
            mma_16<TERM>(acc[k], w[tile], prmt(v[0][term][k / 2], v[1][term][k / 2], pick), prmt(v[2][term][k / 2], v[3][term][k / 2], pick));
          }
      }
      if (any)
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int channel = c + 16 * t + 8 * j;
          if (channel < HEAD_DIM) {
            float4* to = (float4*)(p.part + (slot * QUERIES + i) * DIM + channel);
            to[0] = make_float4(acc[0][j] + acc[0][2 + j], acc[1][j] + acc[1][2 + j], acc[2][j] + acc[2][2 + j], acc[3][j] + acc[3][2 + j]);
            to[1] = make_float4(acc[4][j] + acc[4][2 + j], acc[5][j] + acc[5][2 + j], acc[6][j] + acc[6][2 + j], acc[7][j] + acc[7][2 + j]);
          }
        }
    }
  }
}
}  // namespace exact
