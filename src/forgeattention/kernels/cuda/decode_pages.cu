// Pages back to vectors. One CTA per page, KV head and row.
//
// Macros besides those of page.cuh: FA_ROTATION (IDENTITY leaves the stored vectors rotated), FA_WIDTH (channels of a result),
// FA_TYPE, FA_PARAMS_BYTES.
#include "page.cuh"
#include "transform.cuh"

constexpr int THREADS = 256, WARPS = THREADS / 32, E = DIM / 32;
constexpr int ROW = DIM + 1;

struct Params {
  const u8* base;       // added to offsets; null if they are addresses
  const i64* offsets;   // [batch, max_pages] bytes
  const int* lengths;   // [batch] tokens
  void *k, *v;          // FA_TYPE [batch, kv_heads, max_length, FA_WIDTH]
  TransformArgs k_transform, v_transform;
  i64 max_pages;
  int kv_heads, max_length;
  float k_unit, v_unit;
};
static_assert(sizeof(Params) == FA_PARAMS_BYTES, "the launcher's structure differs");

template <bool KEYS, int BITS, int CODE, int COUNT>
__device__ __forceinline__ void decode(const u8* codes, const int (&levels)[COUNT], float* y, int warp, int lane) {
  for (int unit = warp; unit < UNITS; unit += WARPS) {
    u32 words[BITS], index[4];
#pragma unroll
    for (int b = 0; b < BITS; ++b) words[b] = __ldg((const u32*)codes + fa::word_index(DIM, BITS, lane, unit, b));
    fa::unit_nibbles<BITS, CODE>(words, index);
#pragma unroll
    for (int i = 0; i < 32; ++i) {
      const int n = i >> 3, e = i & 7;
      const u32 at = index[n] >> (4 * e) & 15;
      int level = levels[0];
#pragma unroll
      for (int l = 1; l < COUNT; ++l) level = at == l ? levels[l] : level;
      const int token = KEYS ? fa::k_token(DIM, lane, unit, n) : fa::v_token(lane, n, e);
      const int channel = KEYS ? fa::k_channel(DIM, lane, unit, n, e) : fa::v_channel(lane, unit, e);
      y[token * ROW + channel] = (float)level;
    }
  }
}

template <bool KEYS>
__device__ __forceinline__ void write(const Params& p, const u8* record, const float* scales, const Header& header, const float* y,
                                      int row, int head, int page, int warp, int lane) {
  const TransformArgs& t = KEYS ? p.k_transform : p.v_transform;
  const float unit = KEYS ? p.k_unit : p.v_unit;
  for (int i = warp; i < fa::PAGE; i += WARPS) {
    const int token = page * fa::PAGE + i;
    if (token >= p.max_length) continue;
    const bool valid = token < __ldg(p.lengths + row);
    float x[E];
#pragma unroll
    for (int k = 0; k < E; ++k) {
      const int c = 32 * k + lane;
      x[k] = y[i * ROW + c] * (scales[i] * unit);
      if (KEYS) x[k] = fmaf((float)(signed char)record[MEAN_OFFSET + c], header.mean_scale(), x[k]);
    }
    transform_out<DIM, FA_ROTATION>(x, t, head, lane);
    const i64 at = (((i64)row * p.kv_heads + head) * p.max_length + token) * FA_WIDTH;
#pragma unroll
    for (int k = 0; k < E; ++k) {
      const int c = 32 * k + lane;
      if (FA_WIDTH == HEAD_DIM && t.mu) x[k] += __ldg(t.mu + head * t.mu_stride + c);
      if (c < FA_WIDTH) store_element<FA_TYPE>(KEYS ? p.k : p.v, at + c, valid ? x[k] : 0.f);
    }
  }
}

FA_KERNEL(THREADS) decode_pages(FA_PARAMS p) {
  extern __shared__ __align__(16) u8 shared[];
  float *y = (float*)shared, *scales = y + fa::PAGE * ROW;
  const int page = blockIdx.x, head = blockIdx.y, row = blockIdx.z, warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  const int pages = (__ldg(p.lengths + row) + fa::PAGE - 1) / fa::PAGE;
  if (page >= pages) {
    const int from = page * fa::PAGE, count = min(fa::PAGE, p.max_length - from) * FA_WIDTH;
    const i64 at = (((i64)row * p.kv_heads + head) * p.max_length + from) * FA_WIDTH;
    for (int i = threadIdx.x; i < count; i += THREADS) {
      store_element<FA_TYPE>(p.k, at + i, 0.f);
      store_element<FA_TYPE>(p.v, at + i, 0.f);
    }
    return;
  }
  const u8* record = p.base + __ldg(p.offsets + row * p.max_pages + page) + (i64)head * RECORD;
  const Header header(record + MEAN_OFFSET, lane);
  decode<true, FA_K_BITS, FA_K_CODE>(record, K_LEVELS, y, warp, lane);
  if (warp == 0) *(float2*)(scales + 2 * lane) = decode_scales(load_scales(record + SCALE_OFFSET_K, lane), header.k_base());
  __syncthreads();
  write<true>(p, record, scales, header, y, row, head, page, warp, lane);
  __syncthreads();
  decode<false, FA_V_BITS, FA_V_CODE>(record + K_BYTES, V_LEVELS, y, warp, lane);
  if (warp == 0) *(float2*)(scales + 2 * lane) = decode_scales(load_scales(record + K_BYTES + SCALE_OFFSET_V, lane), header.v_base());
  __syncthreads();
  write<false>(p, record, scales, header, y, row, head, page, warp, lane);
}
