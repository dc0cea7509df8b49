// One page record on int8 tensor cores by one warp: scores of its keys, weighted sums of its values.
//
// FA_DIM (padded), FA_HEAD_DIM, FA_K_BITS, FA_V_BITS, FA_K_CODE, FA_V_CODE, FA_SCALES, FA_K_LEVELS and FA_V_LEVELS
// (ascending int8 levels) are given by the launcher. Lane 4 g + t throughout.
//
// Keys: mma.m16n8k32 with queries as A and keys as B. A query is 16 bits, int8 high and low terms: rows 0-7 of A hold the
// high terms of eight queries, rows 8-15 the low ones, so a lane ends with the scores of query g for tokens 16 t .. 16 t + 15,
// which are the tokens of its fragment of weights when values (A, transposed) meet weights (B).
#pragma once
#include "codes.cuh"
#include "common.cuh"

constexpr int DIM = FA_DIM, HEAD_DIM = FA_HEAD_DIM;
constexpr int UNITS = fa::units(DIM), CHUNK = fa::chunk(DIM), STEPS = DIM / 32;
constexpr int SCALE_OFFSET_K = fa::k_scale_offset(DIM, FA_K_BITS);
constexpr int MEAN_OFFSET = fa::mean_offset(DIM, FA_K_BITS, FA_SCALES);
constexpr int K_BYTES = fa::v_offset(DIM, FA_K_BITS, FA_SCALES);  // the K part of a record
constexpr int RECORD = fa::record_bytes(DIM, FA_K_BITS, FA_V_BITS, FA_SCALES);
constexpr int V_BYTES = RECORD - K_BYTES;
constexpr int SCALE_OFFSET_V = fa::code_bytes(DIM, FA_V_BITS);  // within the V part
static_assert(K_BYTES % 16 == 0 && RECORD % 16 == 0, "bulk copies move 16-byte units");

constexpr int K_COUNT = fa::level_count(FA_K_BITS, FA_K_CODE), V_COUNT = fa::level_count(FA_V_BITS, FA_V_CODE);
constexpr int K_LEVELS[K_COUNT] = {FA_K_LEVELS}, V_LEVELS[V_COUNT] = {FA_V_LEVELS};
constexpr fa::LevelTable<K_COUNT> K_TABLE(K_LEVELS);
constexpr fa::LevelTable<V_COUNT> V_TABLE(V_LEVELS);
constexpr bool K_PAIR = K_COUNT == 16, V_PAIR = V_COUNT == 16;

// Constants in registers for the time pages are read (see load_constants): [16] MAGIC_BITS, then the levels of keys and values.
constexpr bool SAME_TABLE = K_COUNT == V_COUNT && K_TABLE.low[0] == V_TABLE.low[0] && K_TABLE.low[1] == V_TABLE.low[1];
struct Constants {
  Sums start;        // of a chain
  u32 k[4], v[4];    // byte-permute tables: low (or the only one) and high
  static __device__ __forceinline__ void store(u32* to) {
#pragma unroll
    for (int i = 0; i < 4; ++i) to[i] = MAGIC_BITS;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      to[4 + i] = K_TABLE.low[i], to[6 + i] = K_TABLE.high[i];
      to[8 + i] = V_TABLE.low[i], to[10 + i] = V_TABLE.high[i];
    }
  }
  __device__ __forceinline__ explicit Constants(const u32* from) {
    load_constants(from, start.c);
    load_constants(from + 4, k);
    if constexpr (SAME_TABLE) {
#pragma unroll
      for (int i = 0; i < 4; ++i) v[i] = k[i];
    } else {
      load_constants(from + 8, v);
    }
  }
};
constexpr int CONSTANT_WORDS = 12;

// The words of CHUNK units that lie side by side; `codes` is shared memory.
template <int BITS>
__device__ __forceinline__ void load_words(const u8* codes, int chunk, int lane, u32 (&w)[CHUNK][BITS]) {
#pragma unroll
  for (int b = 0; b < BITS; ++b) {
    const u8* at = codes + ((chunk * BITS + b) * 32 + lane) * CHUNK * 4;
    if constexpr (CHUNK == 4) {
      const uint4 v = *(const uint4*)at;
      w[0][b] = v.x, w[1][b] = v.y, w[2][b] = v.z, w[3][b] = v.w;
    } else {
      const uint2 v = *(const uint2*)at;
      w[0][b] = v.x, w[1][b] = v.y;
    }
  }
}

// The header in the low bits of the mean row.
struct Header {
  u32 bits;
  __device__ __forceinline__ Header(const u8* mean, int lane) : bits(__ballot_sync(~0u, mean[lane] & 1)) {}
  __device__ __forceinline__ float mean_scale() const { return half_to_float(bits & 0xFFFF); }
  __device__ __forceinline__ int k_base() const { return (int)(bits << 8) >> 24; }
  __device__ __forceinline__ int v_base() const { return (int)bits >> 24; }
};

// Scales of tokens 2 lane and 2 lane + 1, as stored; and as floats.
__device__ __forceinline__ u32 load_scales(const u8* scales, int lane) {
  return FA_SCALES == fa::FP16 ? *(const u32*)(scales + 4 * lane) : *(const unsigned short*)(scales + 2 * lane);
}
__device__ __forceinline__ float2 decode_scales(u32 two, int base) {
  if constexpr (FA_SCALES == fa::FP16) {
    return make_float2(half_to_float(two & 0xFFFF), half_to_float(two >> 16));
  } else {
    const u32 a = two & 255, b = two >> 8;
    // 2^23 + code as a float; its 32nd part minus 2^18 is exact.
    const float step = 1.f / fa::LOG8_STEPS, zero = (float)base - step - 262144.f;
    const float x = ex2(fmaf(__uint_as_float(0x4B000000u | a), step, zero)), y = ex2(fmaf(__uint_as_float(0x4B000000u | b), step, zero));
    return make_float2(a ? x : 0.f, b ? y : 0.f);
  }
}

// Int8 terms of eight queries in shared memory as A fragments: 16 bytes of query g, quarter t of the channels and step s are
// a0..a3 of lane 4 g + t. The pad spreads them over banks.
constexpr int QUARTER = DIM / 2 + 16;
constexpr int QUERY_BYTES = 8 * 4 * QUARTER;
// The byte of a channel's high term; the low term is 4 bytes on.
__device__ __forceinline__ int query_byte(int query, int channel) {
  const int t = channel / (DIM / 4), at = channel % (DIM / 4);
  return (query * 4 + t) * QUARTER + at / 8 * 16 + (at >> 2 & 1) * 8 + (at & 3);
}
// Splits a query that lies across the warp (element lane + 32 k) into terms: x = step * (256 high + low). Returns 256 step.
__device__ __forceinline__ float split_query(const float (&x)[DIM / 32], u8* terms, int query, int lane) {
  float top = 1e-30f;
#pragma unroll
  for (int k = 0; k < DIM / 32; ++k) top = fmaxf(top, fabsf(x[k]));
  top = warp_max(top);
  const float inverse = 32512.f / top;
#pragma unroll
  for (int k = 0; k < DIM / 32; ++k) {
    const int v = __float2int_rn(x[k] * inverse), at = query_byte(query, lane + 32 * k);
    const int low = (int)(signed char)(v & 255);
    terms[at] = (u8)((v - low) >> 8);
    terms[at + 4] = (u8)low;
  }
  return top * (1.f / 127.f);
}

// The A fragments of eight queries: registers where they fit, else read from shared memory at each use.
constexpr bool QUERIES_IN_REGISTERS = DIM <= 256;
struct Queries {
  uint4 a[QUERIES_IN_REGISTERS ? STEPS : 1];
  const uint4* at;

  // DUP: lanes g and g + 4 take the same query, for groups of at most four.
  template <bool DUP>
  __device__ __forceinline__ void load(const u8* terms, int lane) {
    at = (const uint4*)(terms + (DUP ? lane & 15 : lane) * QUARTER);
    if constexpr (QUERIES_IN_REGISTERS)
#pragma unroll
      for (int s = 0; s < STEPS; ++s) a[s] = at[s];
  }
  __device__ __forceinline__ uint4 get(int s) const { return QUERIES_IN_REGISTERS ? a[QUERIES_IN_REGISTERS ? s : 0] : at[s]; }
};

// A chain of products holds at most 256 channels (see MAGIC).
constexpr int CHAIN = 8;

// A lane's scores: of query g for tokens 16 t + i; where queries are doubled (DUP), lanes of g < 4 keep the first eight of
// these tokens and the others the last eight. Here unscaled query . levels in units of the query's 256 step.
template <bool DUP>
constexpr FA_FN int span() {
  return DUP ? 8 : 16;
}
template <bool DUP>
__device__ __forceinline__ int first_token(int lane) {
  return 16 * (lane & 3) + (DUP ? lane >> 4 << 3 : 0);
}
// Units whose chains of products are interleaved, since a product waits long for the one before it in its chain. They belong
// to different tokens and lie STRIDE apart.
template <int BLOCKS>
constexpr FA_FN int interleaved() {
  return BLOCKS > 1 || (STEPS != 2 && STEPS != 4 && STEPS != 8) ? 1 : 2;
}
constexpr int STRIDE = STEPS == 8 ? 2 : 1;

template <bool DUP, int BLOCKS>
__device__ __forceinline__ void key_sums(const u8* codes, int lane, const Queries (&q)[BLOCKS], const Constants& c,
                                         float (&s)[BLOCKS][span<DUP>()]) {
  constexpr int MANY = interleaved<BLOCKS>();
  Sums plus[MANY][BLOCKS], minus[MANY][BLOCKS];
  float before[BLOCKS][2];
#pragma unroll
  for (int chunk = 0; chunk < UNITS / CHUNK; ++chunk) {
    u32 words[CHUNK][FA_K_BITS];
    load_words<FA_K_BITS>(codes, chunk, lane, words);
#pragma unroll
    for (int turn = 0; turn < CHUNK / MANY; ++turn) {
      u32 index[MANY][4];
#pragma unroll
      for (int m = 0; m < MANY; ++m)
        fa::unit_indices<FA_K_BITS, FA_K_CODE>(words[turn / STRIDE * MANY * STRIDE + turn % STRIDE + m * STRIDE], index[m]);
#pragma unroll
      for (int n = 0; n < 4; ++n)
#pragma unroll
        for (int m = 0; m < MANY; ++m) {
          const int unit = chunk * CHUNK + turn / STRIDE * MANY * STRIDE + turn % STRIDE + m * STRIDE;
          const int at = 4 * unit + n, j = at / STEPS, step = at % STEPS;
          const u32 high = K_PAIR ? index[m][n] ^ 0x88888888u : index[m][n];
          const u32* table = c.k + (K_PAIR ? 2 : 0);
          const u32 b0 = prmt(table[0], table[1], high), b1 = prmt(table[0], table[1], high >> 16);
          u32 c0 = 0, c1 = 0;
          if constexpr (K_PAIR) {
            c0 = prmt(c.k[0], c.k[1], index[m][n]);
            c1 = prmt(c.k[0], c.k[1], index[m][n] >> 16);
          }
#pragma unroll
          for (int b = 0; b < BLOCKS; ++b) {
            Sums &p = plus[m][b], &l = minus[m][b];
            const uint4 a = q[b].get(step);
            const u32 a4[4] = {a.x, a.y, a.z, a.w};
            mma_ss(p, a4, b0, b1, step % CHAIN ? p : c.start);
            if constexpr (K_PAIR) mma_ss(l, a4, c0, c1, step % CHAIN ? l : c.start);
            if (step % CHAIN == CHAIN - 1 || step == STEPS - 1)
#pragma unroll
              for (int k = 0; k < 2; ++k) {
                // high + low / 256; each difference is exact.
                float sum;
                if constexpr (K_PAIR) {
                  sum = fmaf(p[2 + k] - l[2 + k], 1.f / 256.f, p[k] - l[k]);
                } else {
                  sum = fmaf(p[2 + k], 1.f / 256.f, p[k] - (MAGIC + MAGIC / 256.f));
                }
                if (STEPS > CHAIN) {
                  if (step >= CHAIN) sum += before[b][k];
                  before[b][k] = sum;
                }
                if (step == STEPS - 1) {
                  const int i = 2 * j + k;
                  if constexpr (DUP) {
                    s[b][i & 7] = i < 8 || lane >= 16 ? sum : s[b][i & 7];
                  } else {
                    s[b][i] = sum;
                  }
                }
              }
          }
        }
    }
  }
}

// Query . mean row, of query g, in units of the query's 256 step.
__device__ __forceinline__ float mean_sum(const u8* mean, int lane, const Queries& q, const Sums& start) {
  const u8* at = mean + (lane & 3) * (DIM / 4);
  float total = 0.f;
  Sums sums;
#pragma unroll
  for (int step = 0; step < STEPS; ++step) {
    const uint2 b = *(const uint2*)(at + 8 * step);
    const uint4 a = q.get(step);
    const u32 a4[4] = {a.x, a.y, a.z, a.w};
    mma_ss(sums, a4, b.x, b.y, step % CHAIN ? sums : start);
    if (step % CHAIN == CHAIN - 1 || step == STEPS - 1)
      total += fmaf(sums[2], 1.f / 256.f, sums[0] - (MAGIC + MAGIC / 256.f));
  }
  return total;
}

// Levels of one unit as A fragments of two products (32 tokens each): r[4 i ..] are a0..a3 of product i.
__device__ __forceinline__ void value_levels(const u32* table, const u32 (&index)[4], u32 flip, u32 (&r)[8]) {
#pragma unroll
  for (int n = 0; n < 4; ++n) {
    const u32 selector = index[n] ^ flip;
    r[2 * n] = prmt(table[0], table[1], selector);
    r[2 * n + 1] = prmt(table[0], table[1], selector >> 16);
  }
}

template <bool SIGNED>
__device__ __forceinline__ void mma_weights(Sums& d, const u32* a, const u32* w, const Sums& c) {
  if constexpr (SIGNED) {
    mma_ss(d, a, w[0], w[1], c);
  } else {
    mma_su(d, a, w[0], w[1], c);
  }
}

// Weights (u8, or s8 if SIGNED, tokens 16 t + 4 b .. + 3 in w[set][b], query g in column g) times values. Calls use(unit, set, sums) for every unit:
// channel 16 unit + g of queries 2 t, 2 t + 1 in sums 0, 1 and channel + 8 in 2, 3, as exact floats. PAIRS of units are
// interleaved, as chains wait.
template <bool SIGNED = false, int SETS, class Use>
__device__ __forceinline__ void value_sums(const u8* codes, int lane, const u32 (&w)[SETS][4], const Constants& c, Use use) {
  constexpr int PAIRS = SETS > 1 ? 1 : 2;
#pragma unroll
  for (int chunk = 0; chunk < UNITS / CHUNK; ++chunk) {
    u32 words[CHUNK][FA_V_BITS];
    load_words<FA_V_BITS>(codes, chunk, lane, words);
#pragma unroll
    for (int i = 0; i < CHUNK; i += PAIRS) {
      u32 plus[PAIRS][8], minus[PAIRS][8];
      Sums p[PAIRS][SETS], m[PAIRS][SETS];
#pragma unroll
      for (int a = 0; a < PAIRS; ++a) {
        u32 index[4];
        fa::unit_indices<FA_V_BITS, FA_V_CODE>(words[i + a], index);
        value_levels(c.v + (V_PAIR ? 2 : 0), index, V_PAIR ? 0x88888888u : 0u, plus[a]);
        if constexpr (V_PAIR) value_levels(c.v, index, 0u, minus[a]);
      }
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int a = 0; a < PAIRS; ++a)
#pragma unroll
          for (int set = 0; set < SETS; ++set) {
            mma_weights<SIGNED>(p[a][set], plus[a] + 4 * half, w[set] + 2 * half, half ? p[a][set] : c.start);
            if constexpr (V_PAIR) mma_weights<SIGNED>(m[a][set], minus[a] + 4 * half, w[set] + 2 * half, half ? m[a][set] : c.start);
          }
#pragma unroll
      for (int a = 0; a < PAIRS; ++a)
#pragma unroll
        for (int set = 0; set < SETS; ++set) {
          float x[4];
#pragma unroll
          for (int k = 0; k < 4; ++k) x[k] = V_PAIR ? p[a][set][k] - m[a][set][k] : p[a][set][k] - MAGIC;
          use(chunk * CHUNK + i + a, set, x);
        }
    }
  }
}
