// The exact tokens of a row (sinks and recent ones) on 16-bit tensor cores, by tasks of one warp: products of eight
// queries (A: high terms in rows 0-7, low terms in rows 8-15) with 16 keys, then of their weights, split alike, with
// values. Float tokens are two bfloat16 terms each.
#pragma once
#include "decode_args.cuh"

namespace exact {
constexpr int TERM = FORGE_EXACT_TYPE == HALF ? HALF : BFLOAT;
constexpr bool TWO = FORGE_EXACT_TYPE == FLOAT;  // terms of a token
constexpr int EXACT_BLOCK = FORGE_EXACT_BLOCK > 0 ? FORGE_EXACT_BLOCK : 1;
constexpr bool EARLY = !TWO && HEAD_DIM <= 128;  // all of a task's tokens fit the registers
static_assert(HEAD_DIM % 16 == 0, "a lane reads eight channels at a time");

// Channel c of a query is in product step, lane and register of the A fragment as keys are read: lane t takes channels
// 8 t .. 8 t + 7 of 32, four for each of two products. Keeps a query that lies across the warp (element lane + 32 k).
// Returns its factor.
__device__ __forceinline__ float store_query(const float (&x)[E], u8* plain, int query, int lane) {
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
    unsigned short* at =
        (unsigned short*)(rows + ((step * QUERY_ROWS + (query & 7)) * 4 + t) * 16) + (lane >> 1 & 1) * 4 + (lane & 1);
    at[0] = (unsigned short)high;
    at[2] = (unsigned short)low;
  }
  return __uint_as_float(exponent << 23);
}

// Eight channels of a token as words of two; `second` are the second terms.
__device__ __forceinline__ void load(const void* p, i64 at, bool any, u32 (&first)[4], u32 (&second)[4]) {
  u32 w[4] = {0, 0, 0, 0};
  if constexpr (TWO) {
    u32 x[4] = {0, 0, 0, 0};
    if (any) {
      load_early((const float*)p + at, w);
      load_early((const float*)p + at + 4, x);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      split_16<TERM>(__uint_as_float(w[2 * i]), __uint_as_float(w[2 * i + 1]), first[i], second[i]);
      split_16<TERM>(__uint_as_float(x[2 * i]), __uint_as_float(x[2 * i + 1]), first[2 + i], second[2 + i]);
    }
  } else {
    if (any) load_early((const unsigned short*)p + at, w);
#pragma unroll
    for (int i = 0; i < 4; ++i) first[i] = w[i];
  }
}

// Where a token of a row begins: rows of neighbouring tokens, or blocks of FORGE_EXACT_BLOCK tokens, of which stride[0]
// is the distance.
__device__ __forceinline__ i64 place(const Params& p, const Item& it, const i64 (&stride)[3], int token) {
  if constexpr (FORGE_EXACT_BLOCK > 0) {
    const i64 block = __ldg(p.exact_blocks + it.row * p.exact_stride + token / EXACT_BLOCK);
    return block * stride[0] + it.head * stride[1] + token % EXACT_BLOCK * stride[2];
  } else {
    return it.row * stride[0] + it.head * stride[1] + token * stride[2];
  }
}

// The tokens of a task: from, from + 1, ..
struct Task {
  int from;
  u32 k[EARLY ? 2 : 1][EARLY ? E : 1][4], v[EARLY ? (HEAD_DIM + 63) / 64 : 1][4][4];

  // Keys: token 8 half + g, channels 32 b + 8 t ..
  __device__ __forceinline__ void load_key(const Params& p, const Item& it, int half, int b, int lane, u32 (&first)[4],
                                           u32 (&second)[4]) {
    const int channel = 32 * b + 8 * (lane & 3), token = min(from + 8 * half + (lane >> 2), it.exact - 1);
    load(p.exact_k, place(p, it, p.k_stride, token) + channel, channel < HEAD_DIM, first, second);
  }
  // Values: token 8 (j / 2) + 2 t + j % 2, channels 64 c + 8 g ..
  __device__ __forceinline__ void load_value(const Params& p, const Item& it, int j, int c, int lane, u32 (&first)[4],
                                             u32 (&second)[4]) {
    const int channel = 64 * c + 8 * (lane >> 2),
              token = min(from + 8 * (j >> 1) + 2 * (lane & 3) + (j & 1), it.exact - 1);
    load(p.exact_v, place(p, it, p.v_stride, token) + channel, channel < HEAD_DIM, first, second);
  }
  __device__ __forceinline__ void begin(const Params& p, const Item& it, int task, int lane) {
    from = task * EXACT_TOKENS;
    if constexpr (EARLY) {
      u32 none[4];
      if (from >= it.exact) return;
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int b = 0; b < E; ++b) load_key(p, it, half, b, lane, k[half][b], none);
#pragma unroll
      for (int c = 0; c < (HEAD_DIM + 63) / 64; ++c)
#pragma unroll
        for (int j = 0; j < 4; ++j) load_value(p, it, j, c, lane, v[c][j], none);
    }
  }
  // Writes the task's output, maximum and sum to its partial.
  __device__ __forceinline__ void attend(const Params& p, const Item& it, const Shared& sh, i64 partial, int lane) {
    const int g = lane >> 2, t = lane & 3;
    for (int block = 0; block < QUERIES && it.query_tile * QUERIES + block < p.queries; block += 8) {
      const int i = block + g, query = it.query_tile * QUERIES + i;
      const bool any = i < QUERIES && query < p.queries;
      const int end = any ? it.exact - (p.causal ? p.n - 1 - query % p.n : 0) : 0;
      const float size = sh.size[any ? i : 0] * p.scale_log2;
      float s[2][2], top = NO_MAX;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float d[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
        for (int b = 0; b < E; ++b) {
          u32 one[4], two[4];
          if constexpr (!EARLY) load_key(p, it, half, b, lane, one, two);
          const u32(&words)[4] = EARLY ? k[EARLY ? half : 0][EARLY ? b : 0] : one;
#pragma unroll
          for (int step = 0; step < 2; ++step) {
            uint4 a = make_uint4(0, 0, 0, 0);
            if (QUERY_ROWS == 8 || g < QUERY_ROWS)
              a = *(const uint4*)(sh.plain + block * ROW_BYTES + (((2 * b + step) * QUERY_ROWS + g) * 4 + t) * 16);
            const u32 a4[4] = {a.x, a.y, a.z, a.w};
            mma_16<TERM>(d, a4, words[2 * step], words[2 * step + 1]);
            if constexpr (TWO) mma_16<TERM>(d, a4, two[2 * step], two[2 * step + 1]);
          }
        }
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          s[half][j] = from + 8 * half + 2 * t + j < end ? (d[j] + d[2 + j]) * size : NEG_INF;
          top = fmaxf(top, s[half][j]);
        }
      }
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
      float sum = 0.f;
      u32 w[4];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float x = ex2(s[half][0] - top), y = ex2(s[half][1] - top);
        sum += x + y;
        split_16<TERM>(x, y, w[2 * half], w[2 * half + 1]);
      }
      sum += __shfl_xor_sync(~0u, sum, 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
      if (any && t == 0) p.part_ml[partial * QUERIES + i] = make_float2(top, sum);
#pragma unroll
      for (int c = 0; c < (HEAD_DIM + 63) / 64; ++c) {
        float acc[8][4];
#pragma unroll
        for (int n = 0; n < 8; ++n)
#pragma unroll
          for (int j = 0; j < 4; ++j) acc[n][j] = 0.f;
        u32 one[4][4], two[4][4];
        if constexpr (!EARLY)
#pragma unroll
          for (int j = 0; j < 4; ++j) load_value(p, it, j, c, lane, one[j], two[j]);
#pragma unroll
        for (int term = 0; term < 1 + TWO; ++term) {
          const u32(&words)[4][4] = EARLY ? v[EARLY ? c : 0] : term ? two : one;
#pragma unroll
          for (int n = 0; n < 8; ++n) {
            const u32 pick = n & 1 ? 0x7632u : 0x5410u;
            mma_16<TERM>(acc[n], w, prmt(words[0][n / 2], words[1][n / 2], pick),
                         prmt(words[2][n / 2], words[3][n / 2], pick));
          }
        }
        if (any)
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            const int channel = 64 * c + 16 * t + 8 * j;
            if (channel < HEAD_DIM)
#pragma unroll
              for (int n = 0; n < 8; n += 4)
                *(float4*)(p.part + (partial * QUERIES + i) * DIM + channel + n) =
                    make_float4(acc[n][j] + acc[n][2 + j], acc[n + 1][j] + acc[n + 1][2 + j],
                                acc[n + 2][j] + acc[n + 2][2 + j], acc[n + 3][j] + acc[n + 3][2 + j]);
          }
      }
    }
  }
};
}  // namespace exact
