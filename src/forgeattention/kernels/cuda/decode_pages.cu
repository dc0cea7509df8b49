// Pages back to vectors. One CTA per page, KV head and row.
//
// Macros besides those of page.cuh: FORGE_ROTATION (IDENTITY leaves the stored vectors rotated), FORGE_WIDTH (channels
// of a result), FORGE_TYPE.
#include "page.cuh"
#include "transform.cuh"

constexpr int THREADS = 256, WARPS = THREADS / 32, E = DIM / 32;
constexpr int ROW = DIM + 4;  // floats between tokens in shared memory

// Where a level lies in shared memory. Runs of eight channels change places within their 32, so that neither the lanes
// of a key's unit (quarters of the channels) nor those of a value's (tokens 16 apart) meet in a bank.
__device__ __forceinline__ int place(int token, int channel) {
  return token * ROW + (channel ^ ((token >> 4 ^ channel >> 5) & 3) << 3);
}

// Levels of four codes plus 128, a byte each; indices in the low nibbles.
template <int COUNT>
__device__ __forceinline__ u32 biased_levels(const forge::LevelTable<COUNT>& table, u32 index) {
  if constexpr (forge::LevelTable<COUNT>::PAIR) {
    const u32 low = prmt(table.low[0], table.low[1], index), high = prmt(table.high[0], table.high[1], index ^ 0x8888u);
    return (low ^ 0x80808080u) + high + 0x01010101u;
  } else {
    return prmt(table.low[0], table.low[1], index) ^ 0x80808080u;
  }
}

template <bool KEYS, int BITS, int CODE, int COUNT>
__device__ __forceinline__ void decode(const u8* codes, const forge::LevelTable<COUNT>& table, float* y, int warp,
                                       int lane) {
  for (int unit = warp; unit < UNITS; unit += WARPS) {
    u32 words[BITS], index[4];
#pragma unroll
    for (int b = 0; b < BITS; ++b) words[b] = __ldg((const u32*)codes + forge::word_index(DIM, BITS, lane, unit, b));
    forge::unit_indices<BITS, CODE>(words, index);
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      float x[8];
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        const u32 four = biased_levels(table, e < 4 ? index[n] : index[n] >> 16);
        x[e] = __uint_as_float(prmt(four, 0x4B000000u, 0x7440u | (e & 3))) - 8388736.f;  // 2^23 + 128
      }
      if constexpr (KEYS) {
        float4* to = (float4*)(y + place(forge::k_token(DIM, lane, unit, n), forge::k_channel(DIM, lane, unit, n, 0)));
        to[0] = make_float4(x[0], x[1], x[2], x[3]);
        to[1] = make_float4(x[4], x[5], x[6], x[7]);
      } else {
#pragma unroll
        for (int e = 0; e < 8; ++e) y[place(forge::v_token(lane, n, e), forge::v_channel(lane, unit, e))] = x[e];
      }
    }
  }
}

// Eight neighbouring elements, 16-byte aligned where they are of 2 bytes.
__device__ __forceinline__ void store_eight(void* to, i64 at, const float (&x)[8]) {
  if constexpr (FORGE_TYPE == FLOAT) {
    ((float4*)((float*)to + at))[0] = make_float4(x[0], x[1], x[2], x[3]);
    ((float4*)((float*)to + at))[1] = make_float4(x[4], x[5], x[6], x[7]);
  } else {
    u32 w[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
      w[i] = FORGE_TYPE == HALF ? half2(x[2 * i], x[2 * i + 1])
                                : float_to_bfloat(x[2 * i]) | float_to_bfloat(x[2 * i + 1]) << 16;
    *(uint4*)((unsigned short*)to + at) = make_uint4(w[0], w[1], w[2], w[3]);
  }
}

template <bool KEYS>
__device__ __forceinline__ void write(const Params& p, const u8* record, const float* scales, const Header& header,
                                      const float* y, int row, int head, int page, int warp, int lane) {
  const TransformArgs& t = KEYS ? p.k_transform : p.v_transform;
  const float unit = KEYS ? p.k_unit : p.v_unit;
  void* to = KEYS ? p.k : p.v;
  const int length = __ldg(p.lengths + row);
  const i64 first = (((i64)row * p.kv_heads + head) * p.max_length + page * forge::PAGE) * FORGE_WIDTH;
  const int tokens = min(forge::PAGE, p.max_length - page * forge::PAGE);
  const signed char* mean = (const signed char*)record + MEAN_OFFSET;
  if constexpr (FORGE_ROTATION == IDENTITY && FORGE_WIDTH == DIM) {
    for (int i = threadIdx.x; i < tokens * (DIM / 8); i += THREADS) {
      const int token = i / (DIM / 8), c = i % (DIM / 8) * 8;
      const float4* from = (const float4*)(y + place(token, c));
      const float4 a = from[0], b = from[1];
      float x[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
      const float scale = scales[token] * unit;
      const bool valid = page * forge::PAGE + token < length;
      const uint2 row8 = KEYS ? __ldg((const uint2*)(mean + c)) : make_uint2(0, 0);
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        x[e] *= scale;
        if (KEYS)
          x[e] = fmaf((float)(signed char)((e < 4 ? row8.x : row8.y) >> 8 * (e & 3)), header.mean_scale(), x[e]);
        if (t.mu) x[e] += __ldg(t.mu + head * t.mu_stride + c + e);
        x[e] = valid ? x[e] : 0.f;
      }
      store_eight(to, first + (i64)token * DIM + c, x);
    }
  } else {
    for (int token = warp; token < tokens; token += WARPS) {
      float x[E];
#pragma unroll
      for (int k = 0; k < E; ++k) {
        const int c = 32 * k + lane;
        x[k] = y[place(token, c)] * (scales[token] * unit);
        if (KEYS) x[k] = fmaf((float)mean[c], header.mean_scale(), x[k]);
      }
      transform_out<DIM, FORGE_ROTATION>(x, t, head, lane);
#pragma unroll
      for (int k = 0; k < E; ++k) {
        const int c = 32 * k + lane;
        if (FORGE_WIDTH == HEAD_DIM && t.mu) x[k] += __ldg(t.mu + head * t.mu_stride + c);
        if (c < FORGE_WIDTH)
          store_element<FORGE_TYPE>(to, first + (i64)token * FORGE_WIDTH + c,
                                    page * forge::PAGE + token < length ? x[k] : 0.f);
      }
    }
  }
}

FORGE_KERNEL(THREADS) decode_pages(FORGE_PARAMS p) {
  extern __shared__ __align__(16) u8 shared[];
  float *y = (float*)(shared + FORGE_AT_Y), *scales = (float*)(shared + FORGE_AT_SCALES);
  const int page = blockIdx.x, head = blockIdx.y, row = blockIdx.z, warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  const int pages = (__ldg(p.lengths + row) + forge::PAGE - 1) / forge::PAGE;
  if (page >= pages) {
    const int from = page * forge::PAGE, count = min(forge::PAGE, p.max_length - from) * FORGE_WIDTH;
    const i64 at = (((i64)row * p.kv_heads + head) * p.max_length + from) * FORGE_WIDTH;
    for (int i = threadIdx.x; i < count; i += THREADS) {
      store_element<FORGE_TYPE>(p.k, at + i, 0.f);
      store_element<FORGE_TYPE>(p.v, at + i, 0.f);
    }
    return;
  }
  const u8* record = p.base + __ldg(p.page_table + row * p.max_pages + page) + (i64)head * RECORD;
  const Header header(record + MEAN_OFFSET, lane);
  decode<true, FORGE_K_BITS, FORGE_K_CODE>(record, K_TABLE, y, warp, lane);
  if (warp == 0)
    *(float2*)(scales + 2 * lane) = decode_scales(load_scales(record + SCALE_OFFSET_K, lane), header.k_base());
  __syncthreads();
  write<true>(p, record, scales, header, y, row, head, page, warp, lane);
  __syncthreads();
  decode<false, FORGE_V_BITS, FORGE_V_CODE>(record + K_BYTES, V_TABLE, y, warp, lane);
  if (warp == 0)
    *(float2*)(scales + 2 * lane) =
        decode_scales(load_scales(record + K_BYTES + SCALE_OFFSET_V, lane), header.v_base());
  __syncthreads();
  write<false>(p, record, scales, header, y, row, head, page, warp, lane);
}
