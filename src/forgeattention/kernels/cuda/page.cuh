// One page record on int8 tensor cores by one warp: scores of its keys, weighted sums of its values.
//
// FORGE_DIM (padded), FORGE_HEAD_DIM, FORGE_K_BITS, FORGE_V_BITS, FORGE_K_CODE, FORGE_V_CODE, FORGE_SCALES,
// FORGE_K_LEVELS and FORGE_V_LEVELS (ascending int8 levels) are given by the launcher. Lane 4 g + t throughout.
//
// Four queries at a time (a block). A query is 16 bits, int8 high and low terms. Keys: mma.m16n8k32 with 16 keys as A
// and queries as B, the terms of query t in columns 2 t and 2 t + 1, so a lane ends with both sums of its query t for
// two tokens. Values (transposed) as A meet weights as B, again high and low bytes in columns 2 t and 2 t + 1; one
// `movmatrix` brings the weights of four tokens there.
#pragma once
#include "codes.cuh"
#include "common.cuh"

constexpr int DIM = FORGE_DIM, HEAD_DIM = FORGE_HEAD_DIM;
constexpr int UNITS = forge::units(DIM), CHUNK = forge::chunk(DIM), STEPS = DIM / 32;
constexpr int SCALE_OFFSET_K = forge::k_scale_offset(DIM, FORGE_K_BITS);
constexpr int MEAN_OFFSET = forge::mean_offset(DIM, FORGE_K_BITS, FORGE_SCALES);
constexpr int K_BYTES = forge::v_offset(DIM, FORGE_K_BITS, FORGE_SCALES);  // the K part of a record
constexpr int RECORD = forge::record_bytes(DIM, FORGE_K_BITS, FORGE_V_BITS, FORGE_SCALES);
constexpr int V_BYTES = RECORD - K_BYTES;
constexpr int SCALE_OFFSET_V = forge::code_bytes(DIM, FORGE_V_BITS);  // within the V part
static_assert(K_BYTES % 16 == 0 && RECORD % 16 == 0, "bulk copies move 16-byte units");

constexpr int K_COUNT = forge::level_count(FORGE_K_BITS, FORGE_K_CODE),
              V_COUNT = forge::level_count(FORGE_V_BITS, FORGE_V_CODE);
constexpr int K_LEVELS[K_COUNT] = {FORGE_K_LEVELS}, V_LEVELS[V_COUNT] = {FORGE_V_LEVELS};
constexpr forge::LevelTable<K_COUNT> K_TABLE(K_LEVELS);
constexpr forge::LevelTable<V_COUNT> V_TABLE(V_LEVELS);
constexpr bool K_PAIR = K_COUNT == 16, V_PAIR = V_COUNT == 16;
constexpr u32 FLIP = 0x88888888u;

// Constants in registers for the time pages are read (see load_constants): MAGIC_BITS, then the levels of keys and
// values.
constexpr bool SAME_TABLE = K_COUNT == V_COUNT && K_TABLE.low[0] == V_TABLE.low[0] && K_TABLE.low[1] == V_TABLE.low[1];
struct Constants {
  Sums start;      // of a chain
  u32 k[4], v[4];  // byte-permute tables: low (or the only one) and high
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
__device__ __forceinline__ void load_words(const u8* codes, int chunk, int lane, u32 (*w)[BITS]) {
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
  __device__ __forceinline__ float k_base() const { return (float)((int)(bits << 8) >> 24); }
  __device__ __forceinline__ float v_base() const { return (float)((int)bits >> 24); }
};

// Scales of tokens 2 lane and 2 lane + 1, as stored; and as floats.
__device__ __forceinline__ u32 load_scales(const u8* scales, int lane) {
  return FORGE_SCALES == forge::FP16 ? *(const u32*)(scales + 4 * lane) : *(const unsigned short*)(scales + 2 * lane);
}
__device__ __forceinline__ float2 decode_scales(u32 two, float base) {
  if constexpr (FORGE_SCALES == forge::FP16) {
    return make_float2(half_to_float(two & 0xFFFF), half_to_float(two >> 16));
  } else {
    const u32 a = two & 255, b = two >> 8;
    // 2^23 + code as a float; its 32nd part minus 2^18 is exact.
    const float step = 1.f / forge::LOG8_STEPS, zero = base - step - 262144.f;
    const float x = ex2(fmaf(__uint_as_float(0x4B000000u | a), step, zero)),
                y = ex2(fmaf(__uint_as_float(0x4B000000u | b), step, zero));
    return make_float2(a ? x : 0.f, b ? y : 0.f);
  }
}

// Int8 terms of queries in shared memory: [query][high, low][channel], rows padded so that loads spread over banks.
constexpr int TERMS_ROW = DIM + 16, QUERY_BYTES = 2 * TERMS_ROW;
// Splits a query that lies across the warp (element lane + 32 k) into terms: x = step * (256 high + low). `totals` are
// the sums of its terms. Returns 256 step.
__device__ __forceinline__ float split_query(const float (&x)[DIM / 32], u8* terms, int (&totals)[2], int lane) {
  float top = 1e-30f;
#pragma unroll
  for (int k = 0; k < DIM / 32; ++k) top = fmaxf(top, fabsf(x[k]));
  top = warp_max(top);
  const float inverse = 32512.f / top;
  totals[0] = totals[1] = 0;
#pragma unroll
  for (int k = 0; k < DIM / 32; ++k) {
    const int v = __float2int_rn(x[k] * inverse);
    const int low = (int)(signed char)(v & 255), high = (v - low) >> 8;
    terms[lane + 32 * k] = (u8)high;
    terms[TERMS_ROW + lane + 32 * k] = (u8)low;
    totals[0] += high;
    totals[1] += low;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) totals[i] = (int)__reduce_add_sync(~0u, totals[i]);
  return top * (1.f / 127.f);
}

// The B fragments of a block of queries: registers where they fit, else read from shared memory at each use.
constexpr bool QUERIES_IN_REGISTERS = DIM <= 256;
struct Queries {
  uint2 b[QUERIES_IN_REGISTERS ? STEPS : 1];
  const uint2* at;
  float total;  // sum of the query's terms, as joined: what the two tables of levels lack, if there are two

  __device__ __forceinline__ void load(const u8* terms, const int* totals, int lane) {
    const int g = lane >> 2, t = lane & 3;
    at = (const uint2*)(terms + g * TERMS_ROW + t * (DIM / 4));
    if constexpr (QUERIES_IN_REGISTERS)
#pragma unroll
      for (int s = 0; s < STEPS; ++s) b[s] = at[s];
    if constexpr (K_PAIR) total = fmaf((float)totals[2 * t + 1], 1.f / 256.f, (float)totals[2 * t]);
  }
  __device__ __forceinline__ uint2 get(int s) const {
    return QUERIES_IN_REGISTERS ? b[QUERIES_IN_REGISTERS ? s : 0] : at[s];
  }
};

// A chain of products holds at most 256 channels (see MAGIC).
constexpr int CHAIN = 8;
// A lane's scores: of query t of a block for token key_token(lane, i), i = 0..7.
constexpr int SPAN = 8;
__device__ __forceinline__ int key_token(int lane, int i) { return (lane >> 3) * 16 + 2 * i + (lane >> 2 & 1); }
// High and low sums to high + low / 256; the first difference is exact.
__device__ __forceinline__ float join_terms(float high, float low) {
  return fmaf(low, 1.f / 256.f, high - (MAGIC + MAGIC / 256.f));
}

// Scores of a page, unscaled: query . levels in units of the query's 256 step. Tokens i = 2 j and 2 j + 1 (a pair) are
// the two halves of a fragment; TOGETHER chains of products are interleaved, since a product waits long for the one
// before it.
template <int BLOCKS>
__device__ __forceinline__ void key_sums(const u8* codes, int lane, const Queries (&q)[BLOCKS], const Constants& c,
                                         float (&s)[BLOCKS][SPAN]) {
  constexpr int TOGETHER = STEPS <= 4 ? 2 : 1;
  constexpr int BATCH = TOGETHER * STEPS / 2;                                // units of so many pairs
  constexpr int GROUP = STEPS == 3 ? UNITS : BATCH > CHUNK ? BATCH : CHUNK;  // units loaded at once
  static_assert(UNITS % GROUP == 0 && GROUP % BATCH == 0 && GROUP % CHUNK == 0, "pairs of tokens are whole units");
#pragma unroll
  for (int from = 0; from < UNITS; from += GROUP) {
    u32 words[GROUP][FORGE_K_BITS];
#pragma unroll
    for (int i = 0; i < GROUP; i += CHUNK) load_words<FORGE_K_BITS>(codes, (from + i) / CHUNK, lane, &words[i]);
#pragma unroll
    for (int batch = 0; batch < GROUP; batch += BATCH) {
      u32 index[BATCH][4];
#pragma unroll
      for (int u = 0; u < BATCH; ++u) forge::unit_indices<FORGE_K_BITS, FORGE_K_CODE>(words[batch + u], index[u]);
      Sums sums[TOGETHER][BLOCKS];
      float before[TOGETHER][BLOCKS][2];
#pragma unroll
      for (int step = 0; step < STEPS; ++step)
#pragma unroll
        for (int m = 0; m < TOGETHER; ++m) {
          const int one = 2 * m * STEPS + step, two = one + STEPS;
          const u32 n[2] = {index[one / 4][one % 4], index[two / 4][two % 4]};
          u32 low[4], high[4];
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            low[i] = prmt(c.k[0], c.k[1], n[i]);
            low[2 + i] = prmt(c.k[0], c.k[1], n[i] >> 16);
            if constexpr (K_PAIR) {
              high[i] = prmt(c.k[2], c.k[3], n[i] ^ FLIP);
              high[2 + i] = prmt(c.k[2], c.k[3], (n[i] ^ FLIP) >> 16);
            }
          }
#pragma unroll
          for (int b = 0; b < BLOCKS; ++b) {
            Sums& d = sums[m][b];
            const uint2 terms = q[b].get(step);
            mma_ss(d, low, terms.x, terms.y, step % CHAIN ? d : c.start);
            if constexpr (K_PAIR) mma_ss(d, high, terms.x, terms.y, d);
            if (step % CHAIN == CHAIN - 1 || step == STEPS - 1)
#pragma unroll
              for (int i = 0; i < 2; ++i) {
                float sum = join_terms(d[2 * i], d[2 * i + 1]);
                if (K_PAIR && step == STEPS - 1) sum += q[b].total;
                if (step >= CHAIN) sum += before[m][b][i];
                before[m][b][i] = sum;
                s[b][2 * (((from + batch) * 4) / (2 * STEPS) + m) + i] = sum;
              }
          }
        }
    }
  }
}

// Query t . mean rows of PAGES pages, in units of the query's 256 step.
template <int PAGES>
__device__ __forceinline__ void mean_sums(const u8* const (&means)[PAGES], int lane, const Queries& q,
                                          const Constants& c, float (&sums)[PAGES]) {
  static_assert(PAGES <= 2, "a fragment has two halves");
  Sums d;
#pragma unroll
  for (int i = 0; i < PAGES; ++i) sums[i] = 0.f;
#pragma unroll
  for (int step = 0; step < STEPS; ++step) {
    const int at = (lane & 3) * (DIM / 4) + 8 * step;
    const uint2 one = *(const uint2*)(means[0] + at), two = PAGES > 1 ? *(const uint2*)(means[PAGES - 1] + at) : one;
    const u32 a[4] = {one.x, two.x, one.y, two.y};
    const uint2 terms = q.get(step);
    mma_ss(d, a, terms.x, terms.y, step % CHAIN ? d : c.start);
    if (step % CHAIN == CHAIN - 1 || step == STEPS - 1)
#pragma unroll
      for (int i = 0; i < PAGES; ++i) sums[i] += join_terms(d[2 * i], d[2 * i + 1]);
  }
}

// Weights of four tokens to a lane's B fragment. `bytes` are the high bytes of key_token(lane, 2 i) and (lane, 2 i +
// 1), then the low ones, of query t; the result holds the bytes of column g for tokens 16 t + 4 i .. + 3.
__device__ __forceinline__ u32 weight_fragment(u32 bytes) {
  u32 d;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(d) : "r"(bytes));
  return prmt(d, 0, 0x3120);
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

// Weights (u8, or s8 if SIGNED, tokens 16 t + 4 i .. + 3 of a page in w[page][set][i], column g) times values, added
// over PAGES pages. Calls use(unit, set, sums) for every unit: channel 16 unit + g of columns 2 t, 2 t + 1 in sums 0, 1
// and channel + 8 in 2, 3, each MAGIC more. TOGETHER units are interleaved, as chains wait.
template <bool SIGNED = false, int PAGES, int SETS, class Use>
__device__ __forceinline__ void value_sums(const u8* const (&codes)[PAGES], int lane, const u32 (&w)[PAGES][SETS][4],
                                           const Constants& c, Use use) {
  static_assert(PAGES <= 2, "a chain holds 128 tokens (see MAGIC)");
  constexpr int TOGETHER = PAGES > 1 ? CHUNK : SETS > 1 ? 1 : 2;
  Sums start[SETS];
#pragma unroll
  for (int set = 0; set < SETS; ++set) {
    start[set] = c.start;
    if constexpr (V_PAIR) {
      const u32 ones[4] = {0x01010101u, 0x01010101u, 0x01010101u, 0x01010101u};
#pragma unroll
      for (int page = 0; page < PAGES; ++page)
#pragma unroll
        for (int half = 0; half < 2; ++half) mma_weights<SIGNED>(start[set], ones, w[page][set] + 2 * half, start[set]);
    }
  }
#pragma unroll
  for (int chunk = 0; chunk < UNITS / CHUNK; ++chunk)
#pragma unroll
    for (int i = 0; i < CHUNK; i += TOGETHER) {
      Sums d[TOGETHER][SETS];
#pragma unroll
      for (int page = 0; page < PAGES; ++page) {
        u32 words[CHUNK][FORGE_V_BITS];
        load_words<FORGE_V_BITS>(codes[page], chunk, lane, words);
#pragma unroll
        for (int a = 0; a < TOGETHER; ++a) {
          u32 index[4], low[8], high[8];
          forge::unit_indices<FORGE_V_BITS, FORGE_V_CODE>(words[i + a], index);
          value_levels(c.v, index, 0u, low);
          if constexpr (V_PAIR) value_levels(c.v + 2, index, FLIP, high);
#pragma unroll
          for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int set = 0; set < SETS; ++set) {
              mma_weights<SIGNED>(d[a][set], low + 4 * half, w[page][set] + 2 * half,
                                  page + half ? d[a][set] : start[set]);
              if constexpr (V_PAIR) mma_weights<SIGNED>(d[a][set], high + 4 * half, w[page][set] + 2 * half, d[a][set]);
            }
        }
      }
#pragma unroll
      for (int a = 0; a < TOGETHER; ++a)
#pragma unroll
        for (int set = 0; set < SETS; ++set) use(chunk * CHUNK + i + a, set, d[a][set]);
    }
}
