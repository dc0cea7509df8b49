// Encode: 64 tokens of one KV head to a page record, from the model's dtype. One CTA per page and head.
//
// Macros besides those of page.cuh: FORGE_ROTATION, FORGE_TYPE, FORGE_KEY_MEAN, FORGE_K_RULE, FORGE_V_RULE (0 unbiased,
// 1 least squares, 2 norm), FORGE_REFINE (several scales are tried), FORGE_SHAPED (keys with feedback), FORGE_PAIRS
// (half of the multiples tried of keys), FORGE_KEY_WARPS (that search keys), FORGE_SHARED_BYTES. The meaning of every
// step is reference/pages.py.
#include "key_search.cuh"
#include "transform.cuh"

constexpr int THREADS = 256, WARPS = THREADS / 32, E = DIM / 32;
constexpr int ROW = DIM + 1;                                              // floats between tokens in shared memory
constexpr bool SEARCHED = FORGE_K_CODE != forge::SCALAR || FORGE_SHAPED;  // keys by key_search.cuh
constexpr int LINES = DIM < THREADS ? DIM : THREADS;  // pairs of units of values that are searched at once

// Shared memory; backends/cuda/encoder.py counts its bytes.
struct Shared {
  float* mean;     // [DIM] key mean in steps, then as rounded
  float* norm;     // [64] root mean square
  float* inverse;  // [64] its inverse, 0 for 0
  float* scale;    // [64]
  float* reduce;   // [WARPS]
  uint2* bins;     // [256] of the side at work
  u8* best;        // [64] multiple that is kept
  u8* u;     // keys that are searched: [CHAINS][U_ROW] halves, then areas and results; vectors stand where areas do
  float* y;  // [64][ROW] rotated vectors
  signed char* bytes;  // [64][DIM] levels of values on paths, or codes of scalars
  u32* x;              // [32][LINES] values on paths
  u32* choices;        // [16][LINES]
  __device__ __forceinline__ Shared(u8* at, bool searched) {
    bins = (uint2*)at;
    mean = (float*)(bins + paths::BINS);
    norm = mean + DIM;
    inverse = norm + forge::PAGE;
    scale = inverse + forge::PAGE;
    reduce = scale + forge::PAGE;
    best = (u8*)(reduce + WARPS);
    u = best + forge::PAGE;
    y = (float*)(u + (searched ? keys::U_BYTES : 0));
    bytes = (signed char*)(y + forge::PAGE * ROW);
    x = (u32*)(bytes + forge::PAGE * DIM);
    choices = x + 32 * LINES;
  }
};
constexpr int FIXED_BYTES = 8 * paths::BINS + 4 * (DIM + 3 * forge::PAGE + WARPS) + forge::PAGE;
constexpr int Y_BYTES = 4 * forge::PAGE * ROW,
              VECTOR_BYTES = Y_BYTES + forge::PAGE * DIM + (FORGE_V_CODE == forge::SCALAR ? 0 : 4 * 48 * LINES);
constexpr int SEARCH_BYTES = keys::KEY_WARPS * keys::Area::BYTES + keys::Results::BYTES;
constexpr int KEY_BYTES = SEARCHED ? keys::U_BYTES + (SEARCH_BYTES > Y_BYTES ? SEARCH_BYTES : Y_BYTES) : 0;
static_assert(FIXED_BYTES + (KEY_BYTES > VECTOR_BYTES ? KEY_BYTES : VECTOR_BYTES) == FORGE_SHARED_BYTES,
              "the launcher counts other sizes");

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
__device__ __forceinline__ bool rotate(const Params& p, const void* x, const i64 (&stride)[3], const TransformArgs& t,
                                       int page, int head, const Shared& sh, int warp, int lane) {
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

template <int BITS, int CODE, int COUNT>
__device__ __forceinline__ void make_bins(const int (&levels)[COUNT], const Shared& sh) {
  if (threadIdx.x < paths::BINS) sh.bins[threadIdx.x] = paths::bin<BITS, CODE>(levels, (int)threadIdx.x - 128);
}

// Root mean squares of the vectors in shared memory (keys minus their mean row).
template <bool KEYS>
__device__ __forceinline__ void measure(float step, const Shared& sh, int warp, int lane) {
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
}

// Scalar codes, each token at the best of several scales; writes codes, leaves scales. Barriers before and after.
template <bool KEYS, int BITS, int RULE, int COUNT>
__device__ __forceinline__ void quantize_scalar(const int (&levels)[COUNT], float unit, float step, u8* codes,
                                                const Shared& sh, int warp, int lane) {
  const float inverse_unit = 1.f / unit;
  for (int token = warp; token < forge::PAGE; token += WARPS) {
    const float n = sh.norm[token], inverse = sh.inverse[token];
    float u[E], uu = 0.f, factor = inverse_unit;
#pragma unroll
    for (int k = 0; k < E; ++k) {
      const int c = 32 * k + lane;
      u[k] = (sh.y[token * ROW + c] - (KEYS ? sh.mean[c] * step : 0.f)) * inverse;
      uu = fmaf(u[k], u[k], uu);
    }
    uu = warp_sum(uu);
    if constexpr (FORGE_REFINE) {
      // Which scale is best is told by levels of values that are rounded to whole levels.
      float fit = 1.f, least = 0.f;
#pragma unroll 1
      for (int round = 0; round < 6; ++round) {
        const float now = round == 0 ? inverse_unit : fit * (0.85f + 0.05f * round) * inverse_unit;
        float uc = 0.f, cc = 0.f;
#pragma unroll
        for (int k = 0; k < E; ++k) {
          const float place = fminf(fmaxf(u[k] * now, -127.f), 127.f) + (12582912.f + 128.f);
          const u32 found = sh.bins[(u32)__float_as_int(place) & 255u].x & 255u;
          const float level = __int_as_float((int)(0x4B000000u | found)) - (8388608.f + 128.f);
          uc = fmaf(u[k], level, uc);
          cc = fmaf(level, level, cc);
        }
        uc = warp_sum(uc) * unit, cc = warp_sum(cc) * (unit * unit);
        if (round == 0 && uc > 0.f) fit = cc / uc;
        const float scale = keys::gain<RULE>(uu, uc, cc), error = uu - 2.f * scale * uc + scale * scale * cc;
        if (round == 0 || error < least) least = error, factor = now;
      }
    }
    float uc = 0.f, cc = 0.f;
#pragma unroll
    for (int k = 0; k < E; ++k) {
      const float x = u[k] * factor;
      int code = 0;
      float level = levels[0];
#pragma unroll
      for (int l = 1; l < COUNT; ++l) {
        const bool above = x > 0.5f * (levels[l] + levels[l - 1]);
        code += above;
        level = above ? (float)levels[l] : level;
      }
      sh.bytes[token * DIM + 32 * k + lane] = (signed char)code;
      uc = fmaf(u[k], level * unit, uc);
      cc = fmaf(level * unit, level * unit, cc);
    }
    uc = warp_sum(uc), cc = warp_sum(cc);
    if (lane == 0) sh.scale[token] = n * keys::gain<RULE>(uu, uc, cc);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < 32 * UNITS; i += THREADS) {
    const int at = i & 31, which = i >> 5;
    u32 nibbles[4] = {0, 0, 0, 0}, words[BITS];
#pragma unroll
    for (int e = 0; e < 8; ++e)
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int token = KEYS ? forge::k_token(DIM, at, which, k) : forge::v_token(at, k, e);
        const int c = KEYS ? forge::k_channel(DIM, at, which, k, e) : forge::v_channel(at, which, e);
        nibbles[k] |= (u32)sh.bytes[token * DIM + c] << (4 * e);
      }
    keys::pack_unit<BITS, forge::SCALAR>(nibbles, words);
#pragma unroll
    for (int b = 0; b < BITS; ++b) *(u32*)(codes + 4 * forge::word_index(DIM, BITS, at, which, b)) = words[b];
  }
  __syncthreads();
}

// Values on trellis paths, a thread two units: writes codes, leaves levels and scales. Barriers before and after.
template <int BITS, int CODE, int RULE>
__device__ __forceinline__ void quantize_paths(float unit, u8* codes, const Shared& sh, int warp, int lane) {
  using Path = paths::Trellis<CODE>;
  // Sixteen tokens share the choice of a scale, which gains little over the best for all.
  const float multiple = (FORGE_REFINE ? 0.97f : 1.f) / (16.f * unit);
#pragma unroll 1
  for (int i = threadIdx.x; i < 32 * UNITS / 2; i += THREADS) {
    const int at = i & 31, which = i >> 5;
    u32* const x = sh.x + threadIdx.x;
    u32* const choices = sh.choices + threadIdx.x;
    const auto number = [&](int i, int h) {
      const int token = forge::v_token(at, i & 3, i >> 2);
      return sh.y[token * ROW + forge::v_channel(at, which + h * (UNITS / 2), i >> 2)] * (sh.inverse[token] * multiple);
    };
#pragma unroll 4
    for (int i = 0; i < 32; ++i) x[i * LINES] = half2(number(i, 0), number(i, 1));
    const auto value = [&](int i) { return x[i * LINES]; };
    const auto none = [](int, u32(&)[8]) {};
    const u32 seam = Path::seam(sh.bins, value);
    Path::template search<false>(sh.bins, seam, choices, nullptr, LINES, value, none, none, [](int, int, u32(&)[8]) {});
#pragma unroll 1
    for (int h = 0; h < 2; ++h) {
      const u32 bits = Path::path(seam, choices, LINES, h);
      u32 c1, c0, nibbles[4], words[BITS];
      Path::subsets(bits, c1, c0);
#pragma unroll
      for (int n = 0; n < 4; ++n) nibbles[n] = bits >> n & 0x11111111u;
#pragma unroll 1
      for (int e = 0; e < 8; ++e)
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          const int i = 4 * e + n;
          const u32 place = paths::bins_of(x[i * LINES]) >> (16 * h) & 255;
          const uint2 found = sh.bins[place];
          const u32 c = 8 * ((c1 >> i & 1) << 1 | (c0 >> i & 1));
          nibbles[n] |= (found.y >> c & 255) << (4 * e);
          sh.bytes[forge::v_token(at, n, e) * DIM + forge::v_channel(at, which + h * (UNITS / 2), e)] =
              (signed char)((int)(found.x >> c & 255) - 128);
        }
      keys::pack_unit<BITS, CODE>(nibbles, words);
#pragma unroll
      for (int b = 0; b < BITS; ++b)
        *(u32*)(codes + 4 * forge::word_index(DIM, BITS, at, which + h * (UNITS / 2), b)) = words[b];
    }
  }
  __syncthreads();
  for (int token = warp; token < forge::PAGE; token += WARPS) {
    const float n = sh.norm[token], inverse = sh.inverse[token];
    float uu = 0.f, uc = 0.f, cc = 0.f;
#pragma unroll
    for (int k = 0; k < E; ++k) {
      const int c = 32 * k + lane;
      const float u = sh.y[token * ROW + c] * inverse, level = sh.bytes[token * DIM + c] * unit;
      uu = fmaf(u, u, uu);
      uc = fmaf(u, level, uc);
      cc = fmaf(level, level, cc);
    }
    uu = warp_sum(uu), uc = warp_sum(uc), cc = warp_sum(cc);
    if (lane == 0) sh.scale[token] = n * keys::gain<RULE>(uu, uc, cc);
  }
  __syncthreads();
}

// Keys by the search: takes the vectors from shared memory, writes codes, leaves scales. Barriers before and after.
template <int RULE>
__device__ __forceinline__ void quantize_keys(const u32* feedback, float unit, float step, u8* codes, const Shared& sh,
                                              int warp, int lane) {
  unsigned short* const u = (unsigned short*)sh.u;
  // Key after key, each channel to the position at which paths visit it: the inverse of forge::k_token and k_channel.
  for (int token = warp; token < forge::PAGE; token += WARPS) {
    const int j = token >> 1 & 7, chain = j / keys::TOKENS * 8 + (token >> 4 << 1 | (token & 1));
    const float inverse = sh.inverse[token];
#pragma unroll
    for (int k = 0; k < E; ++k) {
      const int c = 32 * k + lane, t = c / (DIM / 4), word = j % keys::TOKENS * STEPS + c % (DIM / 4) / 8;
      const int at = (t * keys::RUN + word / 4) * 32 + 4 * (c & 7) + word % 4;
      u[chain * keys::U_ROW + at] =
          (unsigned short)float_to_half((sh.y[token * ROW + c] - sh.mean[c] * step) * inverse);
    }
  }
  __syncthreads();
  u8* const areas = sh.u + keys::U_BYTES;
  const keys::Results results(areas + keys::KEY_WARPS * keys::Area::BYTES);
  keys::search<RULE>(feedback, sh.bins, unit, u, sh.norm, areas, results, warp, lane);
  __syncthreads();
  keys::choose(results, sh.best, sh.scale);
  __syncthreads();
  keys::write(results, sh.best, codes);
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

// The mean row with its header, as codec/packing.py, pack_header; `mean` is in steps. Bytes stay in `rounded` (may be
// `mean`).
__device__ __forceinline__ float header_byte(float mean, u32 header, int channel) {
  if (channel >= forge::HEADER_BYTES) return rintf(mean);
  const float bit = (float)(header >> channel & 1), x = rintf((mean - bit) * 0.5f) * 2.f + bit;
  return x > 127.f ? x - 2.f : x;
}

// One page of one KV head, by a CTA.
__device__ __forceinline__ void encode_page(const Params& p, int page, int head, u8* shared) {
  Shared sh(shared, false);
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  const i64 offset = __ldg(p.offsets + page);
  if (offset < 0) return;
  u8* record = p.base + offset + (i64)head * RECORD;
  make_bins<FORGE_V_BITS, FORGE_V_CODE>(V_LEVELS, sh);
  bool bad = rotate(p, p.v, p.v_stride, p.v_transform, page, head, sh, warp, lane);
  if (__syncthreads_or(bad)) {
    if (threadIdx.x == 0) *p.bad = 1;
    return;
  }
  measure<false>(0.f, sh, warp, lane);
  __syncthreads();
  if constexpr (FORGE_V_CODE == forge::SCALAR) {
    quantize_scalar<false, FORGE_V_BITS, FORGE_V_RULE>(V_LEVELS, p.v_unit, 0.f, record + K_BYTES, sh, warp, lane);
  } else {
    quantize_paths<FORGE_V_BITS, FORGE_V_CODE, FORGE_V_RULE>(p.v_unit, record + K_BYTES, sh, warp, lane);
  }
  int v_base = 0, k_base = 0;
  if constexpr (FORGE_SCALES == forge::LOG8)
    v_base = log8_base(block_max(threadIdx.x < forge::PAGE ? sh.scale[threadIdx.x] : 0.f, sh.reduce));
  bad = store_scales(record + K_BYTES + SCALE_OFFSET_V, v_base, sh);
  make_bins<FORGE_K_BITS, FORGE_K_CODE>(K_LEVELS, sh);

  sh = Shared(shared, SEARCHED);
  const auto rotate_keys = [&]() {
    __syncthreads();
    bad |= rotate(p, p.k, p.k_stride, p.k_transform, page, head, sh, warp, lane);
    __syncthreads();
  };
  rotate_keys();
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
  // Thread c keeps the exact means of channels c and c + THREADS, so that the row can be rounded again.
  float exact[(DIM + THREADS - 1) / THREADS];
#pragma unroll
  for (int i = 0; i < (DIM + THREADS - 1) / THREADS; ++i) {
    const int c = threadIdx.x + i * THREADS;
    exact[i] = c < DIM ? (step > 0.f ? sh.mean[c] / step : sh.mean[c]) : 0.f;
  }
  const auto round = [&]() {
    const u32 header = step_bits | (u32)(k_base & 255) << 16 | (u32)(v_base & 255) << 24;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < (DIM + THREADS - 1) / THREADS; ++i) {
      const int c = threadIdx.x + i * THREADS;
      if (c < DIM) sh.mean[c] = header_byte(exact[i], header, c);
    }
    __syncthreads();
    measure<true>(step, sh, warp, lane);
    __syncthreads();
  };
  // The base of the scales stands in low bits of the row, on which the residual depends: it is guessed from the
  // vectors' norms, with room for what those bits and the search may add, and raised where a scale does not fit after
  // all.
  round();
  if constexpr (FORGE_SCALES == forge::LOG8) {
    const float room = 1.02f * (FORGE_REFINE ? 1.189207115f : 1.0442737824f);  // 2^(1/4), 2^(1/16)
    k_base = log8_base(block_max(threadIdx.x < forge::PAGE ? sh.norm[threadIdx.x] : 0.f, sh.reduce) * room);
    round();
  }
  for (;;) {
    if constexpr (SEARCHED) {
      quantize_keys<FORGE_K_RULE>(p.feedback + head * p.feedback_stride, p.k_unit, step, record, sh, warp, lane);
    } else {
      quantize_scalar<true, FORGE_K_BITS, FORGE_K_RULE>(K_LEVELS, p.k_unit, step, record, sh, warp, lane);
    }
    if constexpr (FORGE_SCALES != forge::LOG8) break;
    const int needed = log8_base(block_max(threadIdx.x < forge::PAGE ? sh.scale[threadIdx.x] : 0.f, sh.reduce));
    if (needed <= k_base) break;
    k_base = needed;
    if constexpr (SEARCHED) rotate_keys();
    round();
  }
  bad |= store_scales(record + SCALE_OFFSET_K, k_base, sh);
  for (int c = threadIdx.x; c < DIM; c += THREADS) record[MEAN_OFFSET + c] = (u8)(signed char)(int)sh.mean[c];
  if (bad) *p.bad = 1;
}

FORGE_KERNEL(THREADS, 1) encode(FORGE_PARAMS p) {
  extern __shared__ __align__(16) u8 shared[];
  encode_page(p, blockIdx.x, blockIdx.y, shared);
}
