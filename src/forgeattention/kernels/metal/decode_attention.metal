// decode_attention: the newest queries over packed and exact tokens, split over tokens. merge_attention joins the
// splits.
//
// Grid: (1 + splits) x row blocks x (batch * kv_heads) threadgroups of 128 threads. Threadgroup 0 in x attends to the
// exact tokens, the others to their share of the packed tiles. A block of ROWS rows (query heads of one KV head times
// queries) shares every read of keys and values. Two barriers per 256 tokens.
//
// A page is 100 bytes per token and KV head at head_dim 128 and 3.125 bits, where FP16 attention reads 512; a code
// costs a bit field extract, a shuffle and one FMA per row. No Mac has run this kernel: what limits it there is not
// known.

#include "page.metal"

namespace forge {

// Floats of threadgroup memory: q [ROWS, D], weights [ROWS, TILE], maxima and sums [2, 4, ROWS]; joining reuses it.
constexpr int decode_scratch(int dim, int rows) {
  return larger(rows * dim + rows * TILE + 2 * TILE_PAGES * rows, join_scratch(dim, rows));
}

// One threadgroup's share of the packed tokens.
// q: [rows, D] rotated queries of one KV head times softmax scale and log2 e; bias: [rows], what every packed score
// gains (q . mu, same units).
// Results: unnormalised o [rows, D], and (m, l) [rows, 2] in log2 units.
template <class P, int ROWS, class Bias, class PageTable>
inline void attend_packed(const device float* q, Bias bias, int rows, const device uchar* base, PageTable pages,
                          int head, int length, int split, float k_levels, float v_levels, device float* o,
                          device float* ml, threadgroup float* scratch, uint simdgroup, uint lane) {
  threadgroup float* queries = scratch;
  threadgroup float* weights = queries + ROWS * P::D;
  threadgroup float* tops = weights + ROWS * TILE;
  threadgroup float* totals = tops + TILE_PAGES * ROWS;
  const int me = int(simdgroup * 32 + lane);
  stage_queries<P::D, ROWS>(q, rows, queries, me);
  float offset[ROWS], top[ROWS], total[ROWS], sum[2 * Share<P>::COUNT][ROWS];
  FORGE_UNROLL
  for (int r = 0; r < ROWS; ++r) {
    offset[r] = r < rows ? bias[r] : 0.0f;
    top[r] = -INFINITY;
    total[r] = 0.0f;
    FORGE_UNROLL
    for (int i = 0; i < 2 * Share<P>::COUNT; ++i) sum[i][r] = 0.0f;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  const int page_count = (length + PAGE - 1) / PAGE, tiles = (length + TILE - 1) / TILE;
  const int splits = split_count(tiles);
  const int begin = split < splits ? tiles * split / splits : 0;
  const int end = split < splits ? tiles * (split + 1) / splits : 0;
  for (int tile = begin; tile < end; ++tile) {
    const int page = tile * TILE_PAGES + int(simdgroup);
    float s[2][ROWS], v_scale[2] = {0.0f, 0.0f};
    FORGE_UNROLL
    for (int h = 0; h < 2; ++h) {
      FORGE_UNROLL
      for (int r = 0; r < ROWS; ++r) s[h][r] = -INFINITY;
    }
    if (page < page_count) {
      const device uchar* record = base + (pages[page] + long(head) * P::BYTES);
      const int exponent = v_base(page_header(record + P::MEAN, lane));
      page_scores<P, ROWS>(record, queries, k_levels, lane, s);
      FORGE_UNROLL
      for (int h = 0; h < 2; ++h) {
        const int token = owned_token(lane, h);
        v_scale[h] = token_scale<P::SCALES>(record + P::V_SCALES, token, exponent);
        FORGE_UNROLL
        for (int r = 0; r < ROWS; ++r) s[h][r] = page * PAGE + token < length ? s[h][r] + offset[r] : -INFINITY;
      }
    }
    FORGE_UNROLL
    for (int r = 0; r < ROWS; ++r) {
      const float m = simd_max(max(s[0][r], s[1][r]));
      if (lane == 0) tops[int(simdgroup) * ROWS + r] = m;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    FORGE_UNROLL
    for (int r = 0; r < ROWS; ++r) {
      float m = top[r];
      FORGE_UNROLL
      for (int k = 0; k < TILE_PAGES; ++k) m = max(m, tops[k * ROWS + r]);
      const float zero = finite_or_zero(m), shrink = exp2(top[r] - zero);
      top[r] = m;
      total[r] *= shrink;
      FORGE_UNROLL
      for (int i = 0; i < 2 * Share<P>::COUNT; ++i) sum[i][r] *= shrink;
      FORGE_UNROLL
      for (int h = 0; h < 2; ++h) {
        const float p = exp2(s[h][r] - zero);
        total[r] += p;
        weights[r * TILE + int(simdgroup) * PAGE + owned_token(lane, h)] = p == 0.0f ? 0.0f : p * v_scale[h];
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    tile_values<P, ROWS, false>(base, pages, head, tile * TILE_PAGES, page_count, weights, v_levels, simdgroup, lane,
                                sum);
  }
  FORGE_UNROLL
  for (int r = 0; r < ROWS; ++r) {
    const float l = simd_sum(total[r]);
    if (lane == 0) totals[int(simdgroup) * ROWS + r] = l;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  FORGE_UNROLL
  for (int r = 0; r < ROWS; ++r) {
    if (me != r || r >= rows) continue;
    float l = 0.0f;
    FORGE_UNROLL
    for (int k = 0; k < TILE_PAGES; ++k) l += totals[k * ROWS + r];
    ml[2 * r] = top[r];
    ml[2 * r + 1] = l;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  join_values<P, ROWS>(sum, scratch, simdgroup, lane);
  for (int i = me; i < rows * P::D; i += 128) o[i] = scratch[i];
}

// The exact tokens by one threadgroup; each simdgroup keeps its own result, over every fourth run of 32 tokens.
// q: [rows, DIM] times softmax scale and log2 e; k, v: [capacity, DIM]; limit: row r sees tokens below limit[r].
// Results of this simdgroup: o [rows, DIM], (m, l) [rows, 2].
template <class T, int DIM, int ROWS>
inline void attend_exact(const device float* q, int rows, const device T* k, const device T* v, int length,
                         thread const int (&limit)[ROWS], device float* o, device float* ml, threadgroup float* queries,
                         uint simdgroup, uint lane) {
  enum { CHUNKS = (DIM + 31) / 32 };
  for (int i = int(simdgroup * 32 + lane); i < ROWS * DIM; i += 128) queries[i] = i < rows * DIM ? q[i] : 0.0f;
  float top[ROWS], total[ROWS], sum[ROWS][CHUNKS];
  FORGE_UNROLL
  for (int r = 0; r < ROWS; ++r) {
    top[r] = -INFINITY;
    total[r] = 0.0f;
    FORGE_UNROLL
    for (int c = 0; c < CHUNKS; ++c) sum[r][c] = 0.0f;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  for (int first = int(simdgroup) * 32; first < length; first += 128) {
    const int token = first + int(lane);
    float p[ROWS];
    FORGE_UNROLL
    for (int r = 0; r < ROWS; ++r) p[r] = 0.0f;
    if (token < length) {
      const device vec<T, 4>* key = (const device vec<T, 4>*)(k + token * DIM);
      for (int c = 0; c < DIM / 4; ++c) {
        const vec<T, 4> x = key[c];
        FORGE_UNROLL
        for (int r = 0; r < ROWS; ++r) {
          const float4 y = *(threadgroup const float4*)(queries + r * DIM + 4 * c);
          p[r] += dot(float4(x), y);
        }
      }
    }
    FORGE_UNROLL
    for (int r = 0; r < ROWS; ++r) {
      const float s = token < min(length, limit[r]) ? p[r] : -INFINITY;
      const float m = max(top[r], simd_max(s)), zero = finite_or_zero(m), shrink = exp2(top[r] - zero);
      p[r] = exp2(s - zero);
      top[r] = m;
      total[r] = total[r] * shrink + p[r];
      FORGE_UNROLL
      for (int c = 0; c < CHUNKS; ++c) sum[r][c] *= shrink;
    }
    const int count = min(32, length - first);
    for (int i = 0; i < count; ++i) {
      float x[CHUNKS];
      FORGE_UNROLL
      for (int c = 0; c < CHUNKS; ++c) {
        const int channel = 32 * c + int(lane);
        x[c] = channel < DIM ? float(v[(first + i) * DIM + channel]) : 0.0f;
      }
      FORGE_UNROLL
      for (int r = 0; r < ROWS; ++r) {
        const float weight = simd_broadcast(p[r], ushort(i));
        FORGE_UNROLL
        for (int c = 0; c < CHUNKS; ++c) sum[r][c] = fma(weight, x[c], sum[r][c]);
      }
    }
  }
  FORGE_UNROLL
  for (int r = 0; r < ROWS; ++r) {
    const float l = simd_sum(total[r]);
    if (r >= rows) continue;
    if (lane == 0) ml[2 * r] = top[r], ml[2 * r + 1] = l;
    FORGE_UNROLL
    for (int c = 0; c < CHUNKS; ++c) {
      if (32 * c + int(lane) < DIM) o[r * DIM + 32 * c + int(lane)] = sum[r][c];
    }
  }
}

// q: [batch, q_heads, n, D] f32, rotated; q_exact: [batch, q_heads, n, DIM] f32; bias: [batch, q_heads, n] f32, all
// times softmax scale and log2 e. base: pages; page_table: [batch, max_pages] i64; lengths, exact_lengths: [batch] i32;
// exact_k, exact_v: [batch, kv_heads, capacity, DIM]; k_levels, v_levels: [16] f32. packed_o: [batch, kv_heads,
// splits, rows, D] f32, packed_ml: [.., 2]; exact_o: [batch, kv_heads, 4, rows, DIM] f32, exact_ml: [.., 2]; rows =
// q_heads / kv_heads * n, query within.
template <class P, class T, int DIM, int ROWS, bool CAUSAL, class Bias, class PageTable, class Lengths>
inline void decode_attention(const device float* q, const device float* q_exact, Bias bias, const device uchar* base,
                             PageTable page_table, Lengths lengths, int max_pages, const device T* exact_k,
                             const device T* exact_v, Lengths exact_lengths, int capacity, const device float* k_levels,
                             const device float* v_levels, int kv_heads, int all_rows, int n, device float* packed_o,
                             device float* packed_ml, device float* exact_o, device float* exact_ml,
                             threadgroup float* scratch, uint3 group, uint3 groups, uint simdgroup, uint lane) {
  const int pair = int(group.z), row = pair / kv_heads, head = pair % kv_heads;
  const int first = int(group.y) * ROWS, rows = min(ROWS, all_rows - first);
  const int length = lengths[row], exact_length = exact_lengths[row];
  if (group.x == 0) {
    int limit[ROWS];
    for (int r = 0; r < ROWS; ++r) limit[r] = exact_length - (CAUSAL ? n - 1 - (first + r) % n : 0);
    const long at = (long(pair) * TILE_PAGES + simdgroup) * all_rows + first;
    const long tokens = long(pair) * capacity * DIM;
    attend_exact<T, DIM, ROWS>(q_exact + (long(pair) * all_rows + first) * DIM, rows, exact_k + tokens,
                               exact_v + tokens, exact_length, limit, exact_o + at * DIM, exact_ml + at * 2, scratch,
                               simdgroup, lane);
    return;
  }
  const int split = int(group.x) - 1;
  const long at = (long(pair) * (groups.x - 1) + split) * all_rows + first, query = long(pair) * all_rows + first;
  attend_packed<P, ROWS>(q + query * P::D, bias + query, rows, base, page_table + long(row) * max_pages, head, length,
                         split, k_levels[lane & 15], v_levels[lane & 15], packed_o + at * P::D, packed_ml + at * 2,
                         scratch, simdgroup, lane);
}

}  // namespace forge

//! body
alignas(16) threadgroup float scratch[forge::decode_scratch(D, ROWS)];
forge::decode_attention<forge::Page<D, K_BITS, K_CODE, V_BITS, V_CODE, SCALES>, T, DIM, ROWS, CAUSAL>(
    q, q_exact, bias, base, page_table, lengths, page_table_shape[1], exact_k, exact_v, exact_lengths, exact_k_shape[2],
    k_levels, v_levels, exact_k_shape[1], q_shape[1] / exact_k_shape[1] * q_shape[2], q_shape[2], packed_o, packed_ml,
    exact_o, exact_ml, scratch, threadgroup_position_in_grid, threadgroups_per_grid, simdgroup_index_in_threadgroup,
    thread_index_in_simdgroup);
