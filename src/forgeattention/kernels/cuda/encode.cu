// Encode: 64 tokens of one KV head to a page record, from the model's dtype. One CTA per page and head.
//
// Macros besides those of page.cuh: FORGE_ROTATION, FORGE_TYPE, FORGE_KEY_MEAN, FORGE_K_RULE, FORGE_V_RULE (0 unbiased, 1 least squares, 2 norm).
// The meaning of every step is reference/pages.py.
#include "page.cuh"
#include "transform.cuh"

constexpr int THREADS = 256, WARPS = THREADS / 32, E = DIM / 32;
constexpr int ROW = DIM + 1;  // floats between tokens in shared memory

struct Shared {
  float* y;         // [64][ROW] rotated vectors
  signed char* levels;  // [64][DIM] of the last quantisation
  float* mean;      // [DIM] key mean in steps, then as rounded
  float* norm;      // [64] root mean square
  float* inverse;   // [64] its inverse, 0 for 0
  float* scale;     // [64]
  float* edges;     // [2][4][4] trellis: between the levels of a subset; of K, then V
  float* reduce;    // [WARPS]
  __device__ __forceinline__ Shared(u8* at) {
    y = (float*)(at + FORGE_AT_Y);
    mean = (float*)(at + FORGE_AT_MEAN);
    norm = (float*)(at + FORGE_AT_NORM);
    inverse = (float*)(at + FORGE_AT_INVERSE);
    scale = (float*)(at + FORGE_AT_SCALE);
    edges = (float*)(at + FORGE_AT_EDGES);
    reduce = (float*)(at + FORGE_AT_REDUCE);
    levels = (signed char*)(at + FORGE_AT_LEVELS);
  }
};

__device__ __forceinline__ float block_max(float x, float* reduce) {
  x = warp_max(x);
  __syncthreads();
  if ((threadIdx.x & 31) == 0) reduce[threadIdx.x >> 5] = x;
  __syncthreads();
  x = reduce[0];
  for (int i = 1; i < WARPS; ++i) x = fmaxf(x, reduce[i]);
  return x;
}

// Where a token of a page begins.
__device__ __forceinline__ i64 token_at(const Params& p, const i64 (&stride)[3], int page, int head, int token) {
  if (p.slots == nullptr) return page * stride[0] + head * stride[1] + token * stride[2];
  const int slot = -1 - __ldg(p.slots + page * forge::PAGE + token), block = (int)p.exact_block;
  return slot / block * stride[0] + head * stride[1] + slot % block * stride[2];
}
// Rotated vectors of a page to shared memory; true if a value is not finite.
__device__ __forceinline__ bool rotate(const Params& p, const void* x, const i64 (&stride)[3], const TransformArgs& t, int page, int head,
                                       const Shared& sh, int warp, int lane) {
  bool bad = false;
  for (int token = warp; token < forge::PAGE; token += WARPS) {
    const i64 at = token_at(p, stride, page, head, token);
    float v[E];
#pragma unroll
    for (int k = 0; k < E; ++k) {
      const int c = 32 * k + lane;
      v[k] = c < HEAD_DIM ? load_element<FORGE_TYPE>(x, at + c) : 0.f;
      bad |= !(fabsf(v[k]) < __int_as_float(0x7f800000));
      if (t.mu) v[k] -= __ldg(t.mu + head * t.mu_stride + c);
    }
    transform_in<DIM, FORGE_ROTATION>(v, t, head, lane);
#pragma unroll
    for (int k = 0; k < E; ++k) sh.y[token * ROW + 32 * k + lane] = v[k];
  }
  return bad;
}

// Trellis search over the 32 codes of a unit (Viterbi 1967). The path is a circle; the best one starts and ends in one of STATES
// states. Costs of half the circle before and after the seam rank these states, and the two best are searched in full:
// within 0.3 % of the least squared error of all states.
// value(i) is code i's number in units of level 1. The codes are taken in runs that share a word of choices; a run is a real
// loop, so that the compiler does not spread 32 steps over more registers than there are.
template <int BITS, int STATES, int COUNT, class Value>
struct Trellis {
  static constexpr int W = 1 << (BITS - 1), HALF = STATES / 2;  // levels of a subset
  static constexpr int RUN = 32 / STATES;
  static constexpr u32 TAPS1 = STATES == 4 ? 5 : 11, TAPS0 = STATES == 4 ? 2 : 4;
  const int (&levels)[COUNT];
  Value value;

  static __device__ __forceinline__ u32 subset(u32 path) { return (__popc(path & TAPS1) & 1) << 1 | (__popc(path & TAPS0) & 1); }
  // Least squared error of code i within each subset.
  __device__ __forceinline__ void errors(int i, float (&best)[4]) const {
    const float x = value(i);
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      float level = levels[c];
#pragma unroll
      for (int w = 1; w < W; ++w) level = x > 0.5f * (levels[4 * w + c] + levels[4 * w - 4 + c]) ? levels[4 * w + c] : level;
      best[c] = (x - level) * (x - level);
    }
  }
  // Costs after code i from those before it; the bit of the result at a state says which predecessor it has.
  __device__ __forceinline__ u32 step(int i, float (&cost)[STATES]) const {
    float best[4], next[STATES];
    u32 choices = 0;
    errors(i, best);
#pragma unroll
    for (int after = 0; after < STATES; ++after) {
      const int from = after >> 1, u = after & 1;
      const float a = cost[from] + best[subset(from << 1 | u)], b = cost[from + HALF] + best[subset((from + HALF) << 1 | u)];
      next[after] = fminf(a, b);
      if (b < a) choices |= 1u << after;
    }
#pragma unroll
    for (int s = 0; s < STATES; ++s) cost[s] = next[s];
    return choices;
  }
  __device__ __forceinline__ void step_back(int i, float (&cost)[STATES]) const {
    float best[4], next[STATES];
    errors(i, best);
#pragma unroll
    for (int s = 0; s < STATES; ++s) {
      const int to = (s << 1) & (STATES - 1);
      next[s] = fminf(cost[to] + best[subset(s << 1)], cost[to | 1] + best[subset(s << 1 | 1)]);
    }
#pragma unroll
    for (int s = 0; s < STATES; ++s) cost[s] = next[s];
  }
  // Least cost of a path from `seam` to itself, and its choices, STATES bits a code.
  __device__ __forceinline__ float around(int seam, u32 (&choices)[STATES]) const {
    float cost[STATES];
#pragma unroll
    for (int s = 0; s < STATES; ++s) cost[s] = s == seam ? 0.f : 1e30f;
#pragma unroll
    for (int word = 0; word < STATES; ++word) {
      choices[word] = 0;
#pragma unroll 1
      for (int k = 0; k < RUN; ++k) choices[word] |= step(word * RUN + k, cost) << (k * STATES);
    }
    float out = cost[0];
#pragma unroll
    for (int s = 1; s < STATES; ++s) out = s == seam ? cost[s] : out;
    return out;
  }
  // Calls put(i, code, level index) for i = 31 .. 0.
  template <class Put>
  __device__ __forceinline__ void search(const float* edges, Put put) const {
    float before[STATES], after[STATES];
#pragma unroll
    for (int s = 0; s < STATES; ++s) before[s] = after[s] = 0.f;
#pragma unroll 1
    for (int i = 16; i < 32; ++i) {
      step(i, before);
      step_back(31 - i, after);
    }
    int seam = 0, second = 1;
    float least = before[0] + after[0], next = 1e30f;
#pragma unroll
    for (int s = 1; s < STATES; ++s) {
      const float c = before[s] + after[s];
      if (c < least) {
        next = least, second = seam;
        least = c, seam = s;
      } else if (c < next) {
        next = c, second = s;
      }
    }
    u32 choices[STATES], other[STATES];
    const float cost = around(seam, choices);
    if (around(second, other) < cost) {
      seam = second;
#pragma unroll
      for (int s = 0; s < STATES; ++s) choices[s] = other[s];
    }
    u32 state = seam;
#pragma unroll
    for (int word = STATES - 1; word >= 0; --word)
#pragma unroll 1
      for (int k = RUN - 1; k >= 0; --k) {
        const int i = word * RUN + k;
        const u32 from = (state >> 1) + (choices[word] >> (k * STATES + state) & 1) * HALF;
        const u32 u = state & 1, c = subset(from << 1 | u);
        const float x = value(i);
        u32 w = 0;
#pragma unroll
        for (int e = 0; e < W - 1; ++e) w += x > edges[4 * c + e];
        put(i, w << 1 | u, w << 2 | c);
        state = from;
      }
  }
};

// 32 codes to the words of a unit; the codes arrive in descending order of i.
template <int BITS, int CODE>
struct Packer {
  u32 words[BITS];
  __device__ __forceinline__ Packer() {
#pragma unroll
    for (int b = 0; b < BITS; ++b) words[b] = 0;
  }
  // The compiler knows i of scalar codes, not of trellis codes.
  __device__ __forceinline__ void put(int i, u32 code) {
    const int n = i & 3, shift = i & ~3;
    if constexpr (CODE != forge::SCALAR) {
      words[0] |= (code & 1) << i;
      if constexpr (BITS == 2) {
        words[1] |= (code >> 1) << i;
      } else {
        const u32 level = (code >> 1) << (shift + (n < 2 ? 2 : 0));
        words[1] |= n & 1 ? 0 : level;
        words[2] |= n & 1 ? level : 0;
      }
    } else if constexpr (BITS == 4) {
      words[n] |= code << shift;
    } else if constexpr (BITS == 2) {
      words[n >> 1] |= code << (shift + 2 * (n & 1));
    } else if (n < 3) {
      words[n < 3 ? n : 0] |= code << shift;
    } else {
#pragma unroll
      for (int b = 0; b < 3; ++b) words[b] |= (code >> b & 1) << (shift + 3);
    }
  }
};

// Quantises the vectors in shared memory (keys minus their mean row) and writes codes; leaves norms, levels and scales.
template <bool KEYS, int BITS, int CODE, int RULE, int COUNT>
__device__ __forceinline__ void quantize(const int (&levels)[COUNT], float unit, float step, u8* codes, const Shared& sh, int warp, int lane) {
  for (int token = warp; token < forge::PAGE; token += WARPS) {
    float sum = 0.f;
#pragma unroll
    for (int k = 0; k < E; ++k) {
      const int c = 32 * k + lane;
      const float x = sh.y[token * ROW + c] - (KEYS ? sh.mean[c] * step : 0.f);
      sum = fmaf(x, x, sum);
    }
    sum = warp_sum(sum);
    if (lane == 0) {
      const float n = sqrtf(sum * (1.f / DIM));
      sh.norm[token] = n;
      sh.inverse[token] = n > 0.f ? 1.f / n : 0.f;
    }
  }
  __syncthreads();
  const float inverse_unit = 1.f / unit;
  for (int unit_at = warp; unit_at < UNITS; unit_at += WARPS) {
    auto where = [&](int i, int& token, int& channel) {
      if constexpr (KEYS) {
        token = forge::k_token(DIM, lane, unit_at, i & 3);
        channel = forge::k_channel(DIM, lane, unit_at, i & 3, i >> 2);
      } else {
        token = forge::v_token(lane, i & 3, i >> 2);
        channel = forge::v_channel(lane, unit_at, i >> 2);
      }
    };
    auto value = [&](int i) {
      int token, c;
      where(i, token, c);
      return (sh.y[token * ROW + c] - (KEYS ? sh.mean[c] * step : 0.f)) * (sh.inverse[token] * inverse_unit);
    };
    Packer<BITS, CODE> packer;
    auto put = [&](int i, u32 code, u32 index) {
      int token, c;
      where(i, token, c);
      packer.put(i, code);
      int level = levels[0];
#pragma unroll
      for (int l = 1; l < COUNT; ++l) level = index == l ? levels[l] : level;
      sh.levels[token * DIM + c] = (signed char)level;
    };
    if constexpr (CODE == forge::SCALAR) {
#pragma unroll
      for (int i = 31; i >= 0; --i) {
        const float x = value(i);
        u32 code = 0;
#pragma unroll
        for (int l = 1; l < COUNT; ++l) code += x > 0.5f * (levels[l] + levels[l - 1]);
        put(i, code, code);
      }
    } else {
      const Trellis<BITS, CODE == forge::TRELLIS4 ? 4 : 8, COUNT, decltype(value)> trellis{levels, value};
      trellis.search(sh.edges + (KEYS ? 0 : 16), put);
    }
#pragma unroll
    for (int b = 0; b < BITS; ++b) *(u32*)(codes + 4 * forge::word_index(DIM, BITS, lane, unit_at, b)) = packer.words[b];
  }
  __syncthreads();
  for (int token = warp; token < forge::PAGE; token += WARPS) {
    const float n = sh.norm[token], inverse = sh.inverse[token];
    float uu = 0.f, uc = 0.f, cc = 0.f;
#pragma unroll
    for (int k = 0; k < E; ++k) {
      const int c = 32 * k + lane;
      const float u = (sh.y[token * ROW + c] - (KEYS ? sh.mean[c] * step : 0.f)) * inverse, level = sh.levels[token * DIM + c] * unit;
      uu = fmaf(u, u, uu);
      uc = fmaf(u, level, uc);
      cc = fmaf(level, level, cc);
    }
    uu = warp_sum(uu), uc = warp_sum(uc), cc = warp_sum(cc);
    const float gain = RULE == 2 ? sqrtf(uu / cc) : RULE == 1 ? uc / cc : uu / (uc > 0.f ? uc : 1.f);
    if (lane == 0) sh.scale[token] = n * gain;
  }
  __syncthreads();
}

// As codec/packing.py, log8_base.
__device__ __forceinline__ int log8_base(float top) {
  return top > 0.f ? max(-128, min(127, (int)ceilf(log2f(top) - 254.5f / forge::LOG8_STEPS))) : 0;
}
// Stores the scales; true if one does not fit.
__device__ __forceinline__ bool store_scales(u8* to, int base, const Shared& sh) {
  if (threadIdx.x >= forge::PAGE) return false;
  const float s = sh.scale[threadIdx.x];
  if constexpr (FORGE_SCALES == forge::FP16) {
    const u32 bits = float_to_half(s);
    ((unsigned short*)to)[threadIdx.x] = (unsigned short)bits;
    return (bits & 0x7C00u) == 0x7C00u;
  } else {
    const float b = rintf((log2f(s) - base) * forge::LOG8_STEPS) + 1.f;
    to[threadIdx.x] = s < exp2f((float)(base - 1)) ? 0 : (u8)fminf(fmaxf(b, 1.f), 255.f);
    return !(s < __int_as_float(0x7f800000)) || b > 255.5f;
  }
}

// The mean row with its header, as codec/packing.py, pack_header; `mean` is in steps. Bytes stay in `rounded` (may be `mean`).
__device__ __forceinline__ float header_byte(float mean, u32 header, int channel) {
  if (channel >= forge::HEADER_BYTES) return rintf(mean);
  const float bit = (float)(header >> channel & 1), x = rintf((mean - bit) * 0.5f) * 2.f + bit;
  return x > 127.f ? x - 2.f : x;
}

// One page of one head, by a CTA.
__device__ __forceinline__ void encode_page(const Params& p, int page, int head, u8* shared) {
  const Shared sh(shared);
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  const i64 offset = __ldg(p.offsets + page);
  if (offset < 0) return;
  u8* record = p.base + offset + (i64)head * RECORD;
  if (threadIdx.x < 32) {
    const int c = threadIdx.x >> 2 & 3, e = threadIdx.x & 3;
    const bool keys = threadIdx.x < 16;
    float edge = 1e30f;
#pragma unroll
    for (int i = 0; i + 4 < K_COUNT; ++i)
      if (keys && i == 4 * e + c) edge = 0.5f * (K_LEVELS[i + 4] + K_LEVELS[i]);
#pragma unroll
    for (int i = 0; i + 4 < V_COUNT; ++i)
      if (!keys && i == 4 * e + c) edge = 0.5f * (V_LEVELS[i + 4] + V_LEVELS[i]);
    sh.edges[threadIdx.x] = edge;
  }
  bool bad = rotate(p, p.v, p.v_stride, p.v_transform, page, head, sh, warp, lane);
  if (__syncthreads_or(bad)) {
    if (threadIdx.x == 0) *p.bad = 1;
    return;
  }
  quantize<false, FORGE_V_BITS, FORGE_V_CODE, FORGE_V_RULE>(V_LEVELS, p.v_unit, 0.f, record + K_BYTES, sh, warp, lane);
  int v_base = 0;
  if constexpr (FORGE_SCALES == forge::LOG8) v_base = log8_base(block_max(threadIdx.x < forge::PAGE ? sh.scale[threadIdx.x] : 0.f, sh.reduce));
  bad = store_scales(record + K_BYTES + SCALE_OFFSET_V, v_base, sh);
  __syncthreads();

  bad |= rotate(p, p.k, p.k_stride, p.k_transform, page, head, sh, warp, lane);
  __syncthreads();
  float top = 0.f;
  for (int c = threadIdx.x; c < DIM; c += THREADS) {
    float sum = 0.f;
    if constexpr (FORGE_KEY_MEAN)
      for (int token = 0; token < forge::PAGE; ++token) sum += sh.y[token * ROW + c];
    sh.mean[c] = sum * (1.f / forge::PAGE);
    top = fmaxf(top, fabsf(sh.mean[c]));
  }
  top = block_max(top, sh.reduce);
  const u32 step_bits = float_to_half(top / 126.5f);
  const float step = half_to_float(step_bits);
  bad |= (step_bits & 0x7C00u) == 0x7C00u;
  // Thread c keeps the exact means of channels c and c + THREADS, so that the row can be rounded twice.
  float exact[(DIM + THREADS - 1) / THREADS];
  auto round = [&](u32 header) {
#pragma unroll
    for (int i = 0; i < (DIM + THREADS - 1) / THREADS; ++i) {
      const int c = threadIdx.x + i * THREADS;
      if (c < DIM) sh.mean[c] = header_byte(exact[i], header, c);
    }
    __syncthreads();
  };
#pragma unroll
  for (int i = 0; i < (DIM + THREADS - 1) / THREADS; ++i) {
    const int c = threadIdx.x + i * THREADS;
    exact[i] = c < DIM ? (step > 0.f ? sh.mean[c] / step : sh.mean[c]) : 0.f;
  }
  __syncthreads();
  round(step_bits);
  quantize<true, FORGE_K_BITS, FORGE_K_CODE, FORGE_K_RULE>(K_LEVELS, p.k_unit, step, record, sh, warp, lane);
  int k_base = 0;
  if constexpr (FORGE_SCALES == forge::LOG8) {
    // The base follows from the residual, and its bits move some bytes of the row by a step: hence the margin, and another go
    // where a scale does not fit after all.
    int needed = log8_base(block_max(threadIdx.x < forge::PAGE ? sh.scale[threadIdx.x] : 0.f, sh.reduce) * 1.0442737824274138f);  // 2^(1/16)
    do {
      k_base = needed;
      round(step_bits | (u32)(k_base & 255) << 16 | (u32)(v_base & 255) << 24);
      quantize<true, FORGE_K_BITS, FORGE_K_CODE, FORGE_K_RULE>(K_LEVELS, p.k_unit, step, record, sh, warp, lane);
      needed = log8_base(block_max(threadIdx.x < forge::PAGE ? sh.scale[threadIdx.x] : 0.f, sh.reduce));
    } while (needed > k_base);
  }
  bad |= store_scales(record + SCALE_OFFSET_K, k_base, sh);
  for (int c = threadIdx.x; c < DIM; c += THREADS) record[MEAN_OFFSET + c] = (u8)(signed char)(int)sh.mean[c];
  if (bad) *p.bad = 1;
}

FORGE_KERNEL(THREADS, 2) encode(FORGE_PARAMS p) {
  extern __shared__ __align__(16) u8 shared[];
  encode_page(p, blockIdx.x, blockIdx.y, shared);
}
